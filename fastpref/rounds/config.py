"""The `rounds:` section of a configuration file. The rest of the file says how a round trains (train/config.py):

    model_name_or_path: ...
    train_dataset: pairs.jsonl           # its prompts are sampled from; offline_ratio mixes its pairs in
    loss: dpo
    rounds:
      number: 3
      num_generations: 8
      scorer: my_verifier:score

With several `stages`, those before the last are trained once, before the first round; each round trains the last.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from fastpref.train.config import (
    TrainConfig,
    UserError,
    config_from_dict,
    convert,
    differing_keys,
    read_values,
)
from fastpref.train.vllm_engine import EngineName

from .pairing import Pairing


@dataclass(frozen=True)
class RoundsConfig:
    """Every key of the section, with its default."""

    # rounds
    number: int = 3  # how many
    start_from: Literal["previous", "initial"] = "previous"  # the weights that a round's training begins with
    # Whose log-probs the loss compares with: the model before the first round, or as this round began. None: initial
    reference: Literal["initial", "previous"] | None = None
    # Optimiser moments and learning-rate schedule: over all rounds, or anew in each. None: run, where start_from is
    # previous
    schedule: Literal["run", "round"] | None = None
    save_rounds: int = 1  # the model is saved every so many rounds and after the last; --resume trains on from there

    # prompts and sampling
    prompts: Any = None  # files or data sets, as train_dataset; a record may be a prompt alone. None: train_dataset's
    prompts_per_round: int | None = None  # the next so many of a shuffled order; None: all. One batch: online DPO
    num_generations: int = 4  # responses to a prompt; policy_reference: from each of the two models
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    generation_batch_size: int = 32  # responses generated at once
    engine: EngineName = "auto"  # vllm where it is installed and there is a GPU, else transformers

    # scores and pairs
    scorer: str = field(kw_only=True)  # module:function, the folder of a reward model, or implicit:FOLDER
    scorer_timeout: float | None = 10.0  # seconds that a function may take for one response; None: no limit
    pairing: Pairing = "best_worst"
    min_gap: float = 0.0  # least difference in score of a pair; equal scores never make one
    min_score: float | None = None  # least score of a chosen response
    offline_ratio: float = 0.0  # share of a round's examples that come from train_dataset

    # best-of-n evaluation on the prompts of eval_dataset, before the first round and after each
    eval_prompts: int | None = None  # the first so many; None: all, 0: no such evaluation
    eval_num_generations: int | None = None  # None: num_generations

    def __post_init__(self) -> None:
        for key, ok, takes in (
            ("number", self.number >= 1, "at least 1"),
            ("save_rounds", self.save_rounds >= 1, "at least 1"),
            ("prompts_per_round", self.prompts_per_round is None or self.prompts_per_round >= 1, "at least 1"),
            ("num_generations", self.num_generations >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("generation_batch_size", self.generation_batch_size >= 1, "at least 1"),
            ("scorer_timeout", self.scorer_timeout is None or self.scorer_timeout > 0, "above 0"),
            ("min_gap", self.min_gap >= 0, "at least 0"),
            ("offline_ratio", 0 <= self.offline_ratio < 1, "0 to below 1"),
            ("eval_prompts", self.eval_prompts is None or self.eval_prompts >= 0, "at least 0"),
            ("eval_num_generations", (self.eval_num_generations or 1) >= 1, "at least 1"),
        ):
            if not ok:
                raise UserError(f"rounds.{key} is {getattr(self, key)!r}; it takes {takes}")
        if self.num_generations == 1:
            if self.pairing in ("best_worst", "best_random"):
                raise UserError(f"rounds.num_generations is 1, but pairing {self.pairing} needs at least 2")
            if self.pairing == "best_of_n" and self.min_score is None:
                raise UserError("rounds.num_generations is 1: the best of one is no choice; raise it, or set min_score")
        if self.schedule == "run" and self.start_from == "initial":
            raise UserError("rounds.schedule is run, over all rounds, but start_from initial begins anew in each: "
                            "set schedule=round, or start_from=previous")
        if self.pairing == "policy_reference" and self.reference == "previous":
            raise UserError("rounds.pairing policy_reference: with reference previous both samples come from the same "
                            "weights; set reference=initial")

    @property
    def one_schedule(self) -> bool:
        """Whether moments and learning rate go on from round to round."""
        return (self.schedule or ("run" if self.start_from == "previous" else "round")) == "run"

    @property
    def eval_n(self) -> int:
        return self.eval_num_generations or self.num_generations

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Config:
    """A whole configuration file of `fastpref rounds`."""

    train: TrainConfig
    rounds: RoundsConfig

    def __post_init__(self) -> None:
        stage, rounds = self.stage, self.rounds
        kind, pairs = stage.kind, rounds.pairing != "best_of_n"
        if stage.loss == "bradley_terry":
            raise UserError(f"loss {stage.loss!r} trains a reward model: rounds have no policy to sample from")
        if pairs and kind == "sft":
            raise UserError(f"loss {stage.loss!r} trains on completions, but rounds.pairing {rounds.pairing} makes "
                            "pairs: set pairing=best_of_n, or a loss of pairs")
        if not pairs and kind != "sft":
            raise UserError(f"rounds.pairing best_of_n makes completions, but loss {stage.loss!r} trains on pairs: set "
                            "loss=sft")
        if rounds.reference is not None and not stage.loss_fn.needs_reference and rounds.pairing != "policy_reference":
            raise UserError(f"rounds.reference: loss {stage.loss!r} has no reference")
        if stage.ref_model_name_or_path and (rounds.reference is not None or rounds.pairing == "policy_reference"):
            what = "rounds.reference" if rounds.reference is not None else "rounds.pairing policy_reference"
            raise UserError(f"{what} and ref_model_name_or_path name two references: leave one out")
        if rounds.engine == "vllm" and self.train.use_peft:
            raise UserError("rounds.engine vllm takes whole models, and use_peft trains an adapter: set "
                            "engine=transformers")
        if rounds.max_new_tokens >= stage.max_length:
            raise UserError(f"rounds.max_new_tokens is {rounds.max_new_tokens}, which leaves no room for a prompt in "
                            f"max_length={stage.max_length}")
        if stage.dataset_streaming:
            raise UserError("dataset_streaming: rounds read all of their prompts; leave it out of what they train")
        if rounds.prompts is None and stage.train_dataset is None:
            raise UserError("rounds.prompts is missing, and train_dataset too")
        for earlier in self.train.stage_configs()[:-1]:
            if earlier.train_dataset is None:
                raise UserError(f"stage {earlier.name!r}: train_dataset is missing")
        if rounds.offline_ratio and stage.train_dataset is None:
            raise UserError(f"rounds.offline_ratio is {rounds.offline_ratio:g}: it needs a train_dataset")

    @property
    def warm_up(self) -> tuple[Mapping[str, Any], ...]:
        """The stages before the first round."""
        return self.train.stages[:-1]

    @property
    def stage(self) -> TrainConfig:
        """What each round trains."""
        return self.train.stage_configs()[-1]

    @property
    def of_initial(self) -> bool:
        """Whether the loss compares with the model before the first round."""
        stage = self.stage
        own = stage.loss_fn.needs_reference and not stage.ref_model_name_or_path
        return own and self.rounds.reference != "previous"

    @property
    def wants_initial(self) -> bool:
        """Whether the weights before the first round are needed later."""
        rounds = self.rounds
        return self.of_initial or rounds.start_from == "initial" or rounds.pairing == "policy_reference"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the form of the file."""
        return self.train.to_dict() | {"rounds": self.rounds.to_dict()}


# What may differ between the rounds in a folder and those that go on there.
MAY_DIFFER = ("save_rounds", "scorer_timeout")  # and `number`, where the learning rate does not depend on it

_FIELDS = {key.name: key for key in fields(RoundsConfig)}
_TYPES = get_type_hints(RoundsConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides, `rounds.number=5` among them. Errors as train's."""
    return config_from(read_values(path, overrides), str(path))


def config_from(values: Mapping[str, Any], where: str = "config") -> Config:
    """Checks names and types; `where` begins the messages."""
    try:
        section = values.get("rounds")
        if not isinstance(section, Mapping):
            raise UserError("rounds: a section of keys and values is missing" if section is None else
                            f"rounds is {section!r}; it takes keys and values")
        if not section.get("scorer"):
            raise UserError("rounds.scorer is missing; it takes module:function, the folder of a reward model, or "
                            "implicit:FOLDER")
        rounds = RoundsConfig(**_checked(section))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    rest = {key: value for key, value in values.items() if key != "rounds"}
    rest.setdefault("train_dataset", None)  # there may be prompts alone
    train = config_from_dict(rest, where)
    try:
        return Config(train, rounds)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _checked(section: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in section.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1, cutoff=0.0)
            raise UserError(f"rounds.{key}: no such key; the nearest is {near[0]}")
        found[key] = convert(f"rounds.{key}", value, _TYPES[key])
    return found


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys that differ between two `Config.to_dict()`s and that change what is learnt, with both values."""
    before, after = (dict(part.get("rounds") or {}) for part in (saved, now))
    may = MAY_DIFFER if RoundsConfig(**after).one_schedule else (*MAY_DIFFER, "number")
    rest = [{key: value for key, value in part.items() if key != "rounds"} for part in (saved, now)]
    return [*differing_keys(rest[0], rest[1]), *(f"rounds.{line}" for line in differing_keys(before, after, may))]

