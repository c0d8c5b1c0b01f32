"""The examples of every stage, read and tokenised before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from fastpref.data import (
    Example,
    Examples,
    Invalid,
    Record,
    TokenizeReport,
    hashes_of,
    load_examples,
    stream_records,
    tokenize_records,
    with_margins,
)
from fastpref.errors import UserError

from .batch_order import BatchOrder
from .config import TrainConfig
from .display import Display
from .model import check_ids
from .prompts import Question, TokenizedPrompt, first_prompts, questions
from .rendering import rendering_of


@dataclass
class StageData:
    """A stage's examples, and the held-out ones."""

    train: Examples
    eval: Examples = field(default_factory=lambda: Examples([]))
    questions: list[Question] = field(default_factory=list)
    prompts: list[TokenizedPrompt] = field(default_factory=list)  # that the watch samples from

    @property
    def leaked(self) -> float:
        """The share of the held-out examples that are among the training ones, token by token."""
        held_out = hashes_of(self.eval)
        trained = set(hashes_of(self.train)) if held_out else set()
        return sum(one in trained for one in held_out) / max(len(held_out), 1)


class _Records(Sequence[Record]):
    """Of a source, read as far as they are asked for."""

    def __init__(self, stream: Iterator[Record]) -> None:
        self.stream, self.read = stream, list[Record]()

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, i: Any) -> Any:
        self.read += islice(self.stream, max(0, i + 1 - len(self.read)))
        return self.read[i]


def data_options(stage: TrainConfig) -> dict[str, Any]:
    """How `tokenize_records` is to read the stage's data."""
    names = ("max_length", "max_prompt_length", "truncation_mode", "overlong_response")
    return {name: getattr(stage, name) for name in names} | {"rendering": rendering_of(stage)}


def load_data(
    stages: Sequence[TrainConfig], tokenizer: PreTrainedTokenizerBase, display: Display, *, held_out_only: bool = False
) -> list[StageData]:
    """Reads and tokenises everything, for all stages, before anything is trained."""
    records: dict[str, Sequence[Record]] = {}
    made: dict[str, Examples] = {}
    drop = stages[0].invalid_records == "drop"

    def read(source: Any) -> Sequence[Record]:
        stream = stream_records(source, streaming=False, invalid=Invalid() if drop else None)
        return records.setdefault(repr(source), _Records(stream))

    def tokenized(source: Any, stage: TrainConfig, what: str) -> Examples:
        options = data_options(stage)
        streamed = what == "train" and stage.dataset_streaming
        key = repr((source, stage.kind, options, _needs(stage) if streamed else None))
        if key not in made:
            if streamed:
                examples, taken, report = _streamed(stage, tokenizer, options)
                if len(taken) > len(records.get(repr(source), ())):  # the stream's first, of several stages the most
                    records[repr(source)] = taken
                if stage.reward_model:
                    examples = with_margins(examples, taken)
                made[key] = Examples.of(examples, [taken[e.record_id].source for e in examples])
            else:
                with display.counting(f"{stage.name} {what}: records read and tokenised") as show:
                    made[key], report = load_examples(source, tokenizer, stage.kind, drop_invalid=drop, tick=show,
                                                      margins=stage.reward_model, **options)
            display.say(f"{stage.name} {what}: {report}")
            for line in report.invalid.first:
                display.say(f"  dropped: {line}")
        return made[key]

    found = []
    for index, stage in enumerate(stages):
        data = StageData(Examples([]))
        if not held_out_only:
            train = tokenized(stage.train_dataset, stage, "train")
            data.train = _within_budget(stage, train, display) if stage.max_tokens_per_batch else train
        if stage.eval_dataset is not None:
            data.eval = tokenized(stage.eval_dataset, stage, "held-out")
            if stage.eval_generate:
                held_out = read(stage.eval_dataset)
                data.questions = questions(held_out, data.eval, stage.eval_generate_samples)
        if stage.eval_generate and not data.questions:
            raise UserError(f"stage {stage.name!r}: eval_generate needs an eval_dataset with answers")
        if stage.eval_steps and not data.eval:
            raise UserError(f"stage {stage.name!r}: eval_steps needs an eval_dataset")
        if stage.sample_steps and (data.eval or data.train):
            source = stage.train_dataset if stage.eval_dataset is None else stage.eval_dataset
            data.prompts = first_prompts(read(source), data.eval or data.train, stage.sample_prompts)
        if stage.kind == "kto" and data.train:
            _check_labelled(stage, data.train, stage.seed + index, display)
        examples = (example for part in (data.train, data.eval) for example in part)
        check_ids(stage, tokenizer, (ids for e in examples for ids in (e.prompt_ids, *e.responses)))
        if share := 0.0 if held_out_only else data.leaked:
            display.say(f"{stage.name}: {100 * share:.1f} % of the held-out records are among the training ones: "
                        "held-out numbers will look better than they are", "yellow")
        found.append(data)
    return found


def _check_labelled(stage: TrainConfig, examples: Examples, seed: int, display: Display) -> None:
    """Labels of both kinds; and for KTO's baseline in every step two prompts at least, which can be mismatched."""
    kinds = set(examples.labels.tolist())
    if len(kinds) == 1:
        only = "desirable" if kinds == {True} else "undesirable"
        display.say(f"{stage.name}: all {len(examples):,} labels are {only}: nothing keeps the policy from "
                    f"{'raising' if kinds == {True} else 'lowering'} every response alike", "yellow")
    if not stage.loss_fn.needs_kl:
        return
    steps = [[i for batch in step for i in batch] for step in BatchOrder(stage, examples, seed).all_steps()]
    alone = [step for step in steps if all(examples[i].prompt_ids == examples[step[0]].prompt_ids for i in step)]
    if len(alone) == len(steps):
        raise UserError(f"stage {stage.name!r}: no step has two different prompts, which KTO's baseline takes: raise "
                        "per_device_train_batch_size or gradient_accumulation_steps, or take apo_zero_unpaired, which "
                        "has no baseline")
    if alone:
        display.say(f"{stage.name}: {len(alone):,} of {len(steps):,} steps have one prompt only, and so a KL baseline "
                    "of 0", "yellow")


STREAM_PART = 256  # records that are read and tokenised at a time


def _needs(stage: TrainConfig) -> tuple[int | None, int | None]:
    """Of a stream: the stage's steps are full once it has so many examples, or so many tokens."""
    batches = stage.max_steps * stage.gradient_accumulation_steps
    return tuple(size and batches * size for size in (stage.batch_size, stage.max_tokens_per_batch))  # type: ignore[return-value]


def _streamed(
    stage: TrainConfig, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[list[Example], list[Record], TokenizeReport]:
    """The first examples of a stream, no more than the stage's steps take, and the records that were read for them.

    Which they are depends on nothing but stream and configuration: a run that goes on reads the same ones.
    """
    invalid = Invalid() if stage.invalid_records == "drop" else None
    stream, (most, most_tokens) = stream_records(stage.train_dataset, invalid=invalid), _needs(stage)
    examples: list[Example] = []
    records: list[Record] = []
    report, tokens = TokenizeReport(stage.kind, invalid=invalid or Invalid()), 0
    while part := list(islice(stream, STREAM_PART)):
        found, about = tokenize_records(part, tokenizer, stage.kind, partial=True, invalid=invalid, **options)
        report.add(about)
        for example in found:
            size = example.tokens(stage.prefix_sharing)
            if stage.max_tokens_per_batch and size > stage.max_tokens_per_batch:
                if stage.overlong_response != "drop":
                    raise UserError(_too_long(stage, part[example.record_id].source, size) + _ADVICE)
                reason = f"more than max_tokens_per_batch = {stage.max_tokens_per_batch} tokens"
                report.dropped.setdefault(reason, []).append(part[example.record_id].source)
                continue
            examples.append(replace(example, record_id=len(records) + example.record_id))
            tokens += size
            if len(examples) == most or (most_tokens and tokens >= most_tokens):
                report.count(examples)
                return examples, [*records, *part], report
        records += part
    if not examples:
        what = report.none_usable() if records else "the stream has no records"
        raise UserError(f"train_dataset {stage.train_dataset!r}: {what}")
    report.count(examples)
    return examples, records, report


def _within_budget(stage: TrainConfig, examples: Examples, display: Display) -> Examples:
    """An example that fills more than a whole batch follows `overlong_response`: "drop" leaves it out, and says so."""
    tokens, limit = examples.tokens(stage.prefix_sharing), stage.max_tokens_per_batch or 0
    long = numpy.flatnonzero(tokens > limit)
    if not len(long):
        return examples
    what = _too_long(stage, examples.source(long[0]), tokens[long[0]])
    if stage.overlong_response != "drop" or len(long) == len(examples):
        raise UserError(f"{what} ({len(long)} of {len(examples)} examples are like that){_ADVICE}")
    display.say(f"{stage.name} train: {len(long):,} of {len(examples):,} examples dropped (first: {what})")
    return examples.select(numpy.flatnonzero(tokens <= limit))


_ADVICE = ": raise max_tokens_per_batch, lower max_length, or set overlong_response to drop"


def _too_long(stage: TrainConfig, where: str, tokens: int) -> str:
    limit = stage.max_tokens_per_batch
    return f"{where}: prompt and responses are {tokens:,} tokens, more than max_tokens_per_batch={limit} holds"
