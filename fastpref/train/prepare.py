"""Before the first step: the examples of every stage, and the order in which its steps take them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from fastpref.data import (
    Example,
    Examples,
    Invalid,
    Record,
    TokenizeReport,
    batch_order,
    fill_batches,
    lengths_of,
    load_examples,
    stream_records,
    tokenize_records,
    tokens_of,
    with_margins,
)
from fastpref.errors import UserError

from .config import TrainConfig
from .display import Display
from .evaluate import Question, questions
from .model import check_ids, from_config, settings_of
from .rendering import rendering_of
from .source import source_of, source_of_run
from .traits import follows_length, has_table, positions_of
from .watch import FreshPrompt, fresh_prompts


@dataclass
class Data:
    """A stage's examples, and the held-out ones."""

    train: Examples
    eval: Examples = field(default_factory=lambda: Examples([]))
    questions: list[Question] = field(default_factory=list)
    prompts: list[FreshPrompt] = field(default_factory=list)  # that the watch samples from


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
) -> list[Data]:
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
        data = Data(Examples([]))
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
            data.prompts = fresh_prompts(read(source), data.eval or data.train, stage.sample_prompts)
        if stage.kind == "kto" and data.train:
            _check_labelled(stage, data.train, stage.seed + index, display)
        examples = (example for part in (data.train, data.eval) for example in part)
        check_ids(stage, tokenizer, (ids for e in examples for ids in (e.prompt_ids, *e.responses)))
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
    steps = [[i for batch in step for i in batch] for step in Schedule(stage, examples, seed).all_steps()]
    alone = [step for step in steps if all(examples[i].prompt_ids == examples[step[0]].prompt_ids for i in step)]
    if len(alone) == len(steps):
        raise UserError(f"stage {stage.name!r}: no step has two different prompts, which KTO's baseline takes: raise "
                        "per_device_train_batch_size or gradient_accumulation_steps, or take apo_zero_unpaired, which "
                        "has no baseline")
    if alone:
        display.say(f"{stage.name}: {len(alone):,} of {len(steps):,} steps have one prompt only, and so a KL baseline "
                    "of 0", "yellow")


def check_model(stages: Sequence[TrainConfig], lengths: Sequence[Length], display: Display) -> None:
    """What configuration files tell of the models before weights are read: rotary factors that are one choice a run,
    and positions for all that is read or generated. A table of positions has no more; beyond others is a warning."""
    config = stages[0]
    sources = [source_of_run(config)]
    sources += [source_of(name) for stage in stages if (name := stage.ref_model_name_or_path)]
    for source in {source.model: source for source in sources}.values():
        name, settings = source.model, settings_of(config, source)
        if settings is None:
            continue
        if follows_length(settings) and len({stage.max_length for stage in stages}) > 1:
            raise UserError(f"{name}: its rotary factors depend on max_length, which differs between stages; set one")
        limit = positions_of(settings)
        beyond = [length for length in lengths if limit and length.tokens > limit]
        if not limit or not beyond:
            if limit and config.max_length > limit:
                display.say(f"{name}: max_length={config.max_length:,} is more than its {limit:,} positions; no record "
                            "here is so long")
            continue
        with torch.device("meta"):
            table = has_table(from_config(config, source), limit)
        for length in beyond:
            line = f"{name}: has {limit:,} positions, and {length.what} {length.tokens:,} tokens"
            if table:
                raise UserError(f"{line}, for which there is none: {length.way_out.format(limit)}")
            display.say(f"{line}, beyond what it was trained on", "yellow")


@dataclass(frozen=True)
class Length:
    what: str
    tokens: int
    way_out: str  # {}: the model's positions


def needs_of(stages: Sequence[TrainConfig], data: Sequence[Data]) -> list[Length]:
    """The longest sequences of each stage: of its records, and of prompts with all that may be generated."""
    found = []
    for stage, its in zip(stages, data, strict=True):
        most = stage.sample_max_new_tokens
        longest = max(int(max(lengths_of(part), default=0)) for part in (its.train, its.eval))
        found.append(Length(f"the longest record of stage {stage.name!r}", longest,
                            "set max_length={} (overlong_response: what becomes of longer ones)"))
        if its.questions:
            longest = max(len(q.prompt_ids) for q in its.questions) + stage.eval_max_new_tokens
            found.append(Length(f"the longest prompt with eval_max_new_tokens={stage.eval_max_new_tokens}", longest,
                                "lower it (together at most {})"))
        if stage.sample_steps and (its.eval or its.train):
            prompts = [p.ids for p in its.prompts] or [
                e.prompt_ids for e, _ in zip(its.eval or its.train, range(stage.sample_prompts))]
            longest = max(map(len, prompts)) + most
            found.append(Length(f"the longest prompt with sample_max_new_tokens={most}", longest,
                                "lower it (together at most {})"))
    return found


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


class Schedule:
    """Which micro-batches make up which step: a function of configuration and data lengths, so it needs no state."""

    def __init__(self, stage: TrainConfig, examples: Sequence[Example], seed: int) -> None:
        self.seed, self.batch_size, self.max_tokens = seed, stage.batch_size, stage.max_tokens_per_batch
        self.lengths = tokens_of(examples, stage.prefix_sharing) if self.max_tokens else lengths_of(examples)
        self.accumulation = stage.gradient_accumulation_steps
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._begins = [(0, 0)]  # of each epoch so far, and of the next: its first step, its first micro-batch
        self.steps = stage.max_steps
        if self.steps < 1:
            whole = math.floor(stage.num_train_epochs)
            rest = (stage.num_train_epochs - whole) * self._steps(whole) if stage.num_train_epochs > whole else 0
            self.steps = self._begin(whole)[0] + math.ceil(rest)

    def of_step(self, step: int) -> tuple[int, list[list[int]]]:
        """The number of the step's first micro-batch, counted from the stage's start; its micro-batches, as indices of
        examples. A step does not reach from one epoch into the next: the last of an epoch may be smaller.
        """
        epoch = self._epoch_of(step)
        first_step, first_batch = self._begin(epoch)
        start = (step - first_step) * self.accumulation
        return first_batch + start, self._batches(epoch)[start : start + self.accumulation]

    def epoch(self, step: int) -> float:
        epoch = self._epoch_of(step)
        return epoch + (step - self._begin(epoch)[0]) / self._steps(epoch)

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch[0]:
            if self.max_tokens:
                batches = fill_batches(
                    self.lengths, self.max_tokens, batch_size=self.batch_size, seed=self.seed, epoch=epoch
                )
            else:
                batches = batch_order(self.lengths, self.batch_size or 1, seed=self.seed, epoch=epoch)
            self._epoch = epoch, batches
        return self._epoch[1]

    def _steps(self, epoch: int) -> int:
        return self._begin(epoch + 1)[0] - self._begin(epoch)[0]

    def _begin(self, epoch: int) -> tuple[int, int]:
        while len(self._begins) <= epoch:
            steps, batches = self._begins[-1]
            if self.max_tokens:
                count = len(self._batches(len(self._begins) - 1))
            else:
                count = math.ceil(len(self.lengths) / (self.batch_size or 1))
            self._begins.append((steps + math.ceil(count / self.accumulation), batches + count))
        return self._begins[epoch]

    def _epoch_of(self, step: int) -> int:
        epoch = bisect_right(self._begins, step, key=lambda begin: begin[0]) - 1
        while step >= self._begin(epoch + 1)[0]:
            epoch += 1
        return epoch

    def some(self, count: int) -> list[list[int]]:
        """Micro-batches of the first epoch, from that of the shortest longest example to that of the longest."""
        batches = sorted(self._batches(0), key=lambda batch: max(self.lengths[i] for i in batch))
        last = len(batches) - 1
        return [batches[place] for place in sorted({round(n * last / (count - 1)) for n in range(count)})]

    def all_steps(self) -> list[list[list[int]]]:
        return [self.of_step(step)[1] for step in range(self.steps)]
