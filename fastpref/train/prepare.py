"""Before the first step: the examples of every stage, and the order in which its steps take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Record, batch_order, load_records, tokenize_records

from .config import TrainConfig, UserError
from .display import Display
from .evaluate import Question, questions


@dataclass
class Data:
    """A stage's examples, and the held-out ones."""

    train: list[Example]
    eval: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def load_data(
    stages: Sequence[TrainConfig], tokenizer: PreTrainedTokenizerBase, display: Display, *, held_out_only: bool = False
) -> list[Data]:
    """Reads and tokenises everything, for all stages, before anything is trained."""
    records: dict[str, list[Record]] = {}
    made: dict[str, list[Example]] = {}

    def read(source: Any) -> list[Record]:
        key = repr(source)
        if key not in records:
            records[key] = load_records(source)
        return records[key]

    def tokenized(source: Any, stage: TrainConfig, what: str) -> list[Example]:
        options = {
            "max_length": stage.max_length,
            "max_prompt_length": stage.max_prompt_length,
            "truncation_mode": stage.truncation_mode,
            "overlong_response": stage.overlong_response,
        }
        key = repr((source, stage.kind, options))
        if key not in made:
            made[key], report = tokenize_records(read(source), tokenizer, stage.kind, **options)  # type: ignore[arg-type]
            display.say(f"{stage.name} {what}: {report}")
        return made[key]

    found = []
    for stage in stages:
        data = Data([] if held_out_only else tokenized(stage.train_dataset, stage, "train"))
        if stage.eval_dataset is not None:
            data.eval = tokenized(stage.eval_dataset, stage, "held-out")
            if stage.eval_generate:
                held_out = read(stage.eval_dataset)
                data.questions = questions(held_out, data.eval, stage.eval_generate_samples)
        if stage.eval_generate and not data.questions:
            raise UserError(f"stage {stage.name!r}: eval_generate needs an eval_dataset with answers")
        if stage.eval_steps and not data.eval:
            raise UserError(f"stage {stage.name!r}: eval_steps needs an eval_dataset")
        found.append(data)
    return found


class Schedule:
    """Which micro-batches make up which step: a function of configuration and data lengths, so it needs no state."""

    def __init__(self, stage: TrainConfig, examples: Sequence[Example], seed: int) -> None:
        self.lengths = [e.length for e in examples]
        self.batch_size, self.accumulation = stage.per_device_train_batch_size, stage.gradient_accumulation_steps
        self.seed = seed
        self.micro_batches = math.ceil(len(self.lengths) / self.batch_size)  # of one epoch
        self.steps_per_epoch = math.ceil(self.micro_batches / self.accumulation)
        self.steps = stage.max_steps
        if self.steps < 1:
            self.steps = math.ceil(stage.num_train_epochs * self.steps_per_epoch)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def of_step(self, step: int) -> tuple[int, list[list[int]]]:
        """The number of the step's first micro-batch, counted from the stage's start; its micro-batches, as indices of
        examples. A step does not reach from one epoch into the next: the last of an epoch may be smaller.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = epoch, batch_order(self.lengths, self.batch_size, seed=self.seed, epoch=epoch)
        start = place * self.accumulation
        return epoch * self.micro_batches + start, self._epoch[1][start : start + self.accumulation]

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def all_batches(self) -> list[list[int]]:
        return [batch for step in range(self.steps) for batch in self.of_step(step)[1]]
