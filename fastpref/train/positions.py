"""Whether the models have positions for all that is read or generated, told before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpref.data import lengths_of
from fastpref.errors import UserError

from .config import TrainConfig
from .display import Display
from .model import from_config, settings_of
from .source import source_of, source_of_run
from .stage_data import StageData
from .traits import follows_length, has_table, positions_of


def check_positions(stages: Sequence[TrainConfig], lengths: Sequence[SequenceLength], display: Display) -> None:
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
class SequenceLength:
    what: str
    tokens: int
    way_out: str  # {}: the model's positions


def longest_sequences(stages: Sequence[TrainConfig], data: Sequence[StageData]) -> list[SequenceLength]:
    """The longest sequences of each stage: of its records, and of prompts with all that may be generated."""
    found = []
    for stage, its in zip(stages, data, strict=True):
        most = stage.sample_max_new_tokens
        longest = max(int(max(lengths_of(part), default=0)) for part in (its.train, its.eval))
        found.append(SequenceLength(f"the longest record of stage {stage.name!r}", longest,
                                    "set max_length={} (overlong_response: what becomes of longer ones)"))
        if its.questions:
            longest = max(len(q.prompt_ids) for q in its.questions) + stage.eval_max_new_tokens
            asked = f"the longest prompt with eval_max_new_tokens={stage.eval_max_new_tokens}"
            found.append(SequenceLength(asked, longest, "lower it (together at most {})"))
        if stage.sample_steps and (its.eval or its.train):
            prompts = [p.ids for p in its.prompts] or [
                e.prompt_ids for e, _ in zip(its.eval or its.train, range(stage.sample_prompts))]
            longest = max(map(len, prompts)) + most
            asked = f"the longest prompt with sample_max_new_tokens={most}"
            found.append(SequenceLength(asked, longest, "lower it (together at most {})"))
    return found
