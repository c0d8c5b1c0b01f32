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
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from fastpref.errors import UserError, refuse
from fastpref.train.config import EngineName, TrainConfig, checked_config, differing_keys, read_values
from fastpref.train.judge import FORM, SPEC, Judging
from fastpref.train.keys import FREE, check_bounds, convert, key, keys_of, no_such_key

from .pairing import Pairing


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Every key of the section, with its default."""

    number: int = key(3, "how many", "at least 1", section="rounds")
    start_from: Literal["previous", "initial"] = key("previous", "the weights that a round's training begins with")
    reference: Literal["initial", "previous"] | None = key(
        None, "Whose log-probs the loss compares with: the model before the first round, or as this round began. None: "
        "initial")
    schedule: Literal["run", "round"] | None = key(
        None, "Optimiser moments and learning-rate schedule: over all rounds, or anew in each. None: run, where "
        "start_from is previous")
    save_rounds: int = key(
        1, "the model is saved every so many rounds and after the last; --resume trains on from there", "at least 1",
        FREE)

    prompts: Any = key(
        None, "files or data sets, as train_dataset; a record may be a prompt alone. None: train_dataset's",
        section="prompts and sampling")
    prompts_per_round: int | None = key(
        None, "the next so many of a shuffled order; None: all. One batch: online DPO", "at least 1")
    num_generations: int = key(4, "responses to a prompt; policy_reference: from each of the two models", "at least 1")
    temperature: float = key(1.0, "of sampling", "above 0")
    top_p: float = key(1.0, "the likeliest tokens of so much probability are sampled from", "above 0, at most 1")
    max_new_tokens: int = key(256, "of a response", "at least 1")
    generation_batch_size: int = key(32, "responses generated at once", "at least 1")
    engine: EngineName = key("auto", "vllm where it is installed and there is a GPU, else transformers")
    sampler: str | None = key(
        None, "openai:URL: a server with the OpenAI completions API samples (vLLM, SGLang, llama.cpp, `transformers "
        "serve`). None: engine, in this process", section="a server that samples")
    sampler_model: str | None = key(
        None, "the server's name of the model. None: the folder of the weights written for it")
    sampler_reload: str | None = key(
        None, "a command that makes the server load new weights; {folder} in it is where they are. None: the server "
        "loads a model by its folder when asked for it")
    sampler_timeout: float = key(120.0, "seconds that it may take for one response", "above 0", FREE)

    scorer: str = key(
        MISSING, "module:function, the folder of a reward model, implicit:FOLDER, or judge:openai:URL#MODEL",
        section="scores and pairs")
    scorer_timeout: float | None = key(
        10.0, "seconds that a function may take for one response, or a judge for an answer; None: no limit", "above 0",
        FREE)
    judge_prompt: str | None = key(
        None, "a file: what a judge is asked, with {prompt}, {response0} and {response1}. None: judge.TEMPLATE")
    judge_comparisons: int | None = key(
        None, "a judge compares each response with so many that follow it, in a circle, in both orders. None: 2",
        "at least 1")
    pairing: Pairing = key("best_worst", "of the scored responses to a prompt, what a round trains on")
    min_gap: float = key(0.0, "least difference in score of a pair; equal scores never make one", "at least 0")
    min_score: float | None = key(None, "least score of a chosen response")
    offline_ratio: float = key(0.0, "share of a round's examples that come from train_dataset", "0 to below 1")

    eval_prompts: int | None = key(
        None, "the first so many; None: all, 0: no such evaluation", "at least 0",
        section="best-of-n evaluation on the prompts of eval_dataset, before the first round and after each")
    eval_num_generations: int | None = key(None, "None: num_generations", "at least 1")

    def __post_init__(self) -> None:
        check_bounds(self, "rounds.")
        one = self.num_generations == 1
        refuse(
            (one and self.pairing in ("best_worst", "best_random"),
             f"rounds.num_generations is 1, but pairing {self.pairing} needs at least 2"),
            (one and self.pairing == "best_of_n" and self.min_score is None,
             "rounds.num_generations is 1: the best of one is no choice; raise it, or set min_score"),
            (self.schedule == "run" and self.start_from == "initial",
             "rounds.schedule is run, over all rounds, but start_from initial begins anew in each: set schedule=round, "
             "or start_from=previous"),
            (self.pairing == "policy_reference" and self.reference == "previous",
             "rounds.pairing policy_reference: with reference previous both samples come from the same weights; set "
             "reference=initial"),
        )

    @property
    def one_schedule(self) -> bool:
        """Whether moments and learning rate go on from round to round."""
        return (self.schedule or ("run" if self.start_from == "previous" else "round")) == "run"

    @property
    def judging(self) -> Judging:
        """How a judge is asked."""
        return Judging(self.judge_prompt, self.judge_comparisons or Judging.comparisons, self.generation_batch_size)

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
        loss, pairs, reference = repr(stage.loss), rounds.pairing != "best_of_n", rounds.reference is not None
        of_reference = rounds.pairing == "policy_reference"
        judge = rounds.scorer.startswith("judge:openai:")
        what = "rounds.reference" if reference else "rounds.pairing policy_reference"
        refuse(
            (stage.reward_model, f"loss {loss} trains a reward model: rounds have no policy to sample from"),
            (pairs and stage.kind == "sft",
             f"loss {loss} trains on completions, but rounds.pairing {rounds.pairing} makes pairs: set "
             "pairing=best_of_n, or a loss of pairs"),
            (not pairs and stage.kind != "sft",
             f"rounds.pairing best_of_n makes completions, but loss {loss} trains on pairs: set loss=sft"),
            (reference and not stage.loss_fn.needs_reference and not of_reference,
             f"rounds.reference: loss {loss} has no reference"),
            (stage.ref_model_name_or_path and (reference or of_reference),
             f"{what} and ref_model_name_or_path name two references: leave one out"),
            (rounds.sampler and not rounds.sampler.startswith(("openai:http://", "openai:https://")),
             f"rounds.sampler is {rounds.sampler!r}; it takes openai:URL, such as openai:http://localhost:8000/v1"),
            (rounds.sampler and rounds.engine != "auto",
             f"rounds.sampler and rounds.engine {rounds.engine} name two engines: leave one out"),
            ((rounds.sampler_model or rounds.sampler_reload) and not rounds.sampler,
             "rounds.sampler_model and rounds.sampler_reload are of a server: set rounds.sampler=openai:URL"),
            (judge and not SPEC.fullmatch(rounds.scorer),
             f"rounds.scorer is {rounds.scorer!r}; a judge is {FORM}"),
            ((rounds.judge_prompt or rounds.judge_comparisons) and not judge,
             f"rounds.judge_prompt and rounds.judge_comparisons are of a judge: set rounds.scorer={FORM}"),
            (judge and of_reference,
             "rounds.pairing policy_reference compares the scores of two models, and a judge's are of the responses of "
             "one: set pairing=best_worst"),
            (judge and rounds.num_generations == 1,
             "rounds.num_generations is 1: a judge has nothing to compare the response with; raise it"),
            (rounds.engine == "vllm" and self.train.use_peft,
             "rounds.engine vllm takes whole models, and use_peft trains an adapter: set engine=transformers"),
            (rounds.max_new_tokens >= stage.max_length,
             f"rounds.max_new_tokens is {rounds.max_new_tokens}, which leaves no room for a prompt in "
             f"max_length={stage.max_length}"),
            (stage.dataset_streaming,
             "dataset_streaming: rounds read all of their prompts; leave it out of what they train"),
            (rounds.prompts is None and stage.train_dataset is None,
             "rounds.prompts is missing, and train_dataset too"),
            *((earlier.train_dataset is None, f"stage {earlier.name!r}: train_dataset is missing")
              for earlier in self.train.stage_configs()[:-1]),
            (rounds.offline_ratio and stage.train_dataset is None,
             f"rounds.offline_ratio is {rounds.offline_ratio:g}: it needs a train_dataset"),
        )

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


_KEYS = keys_of(RoundsConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides, `rounds.number=5` among them. Errors as train's."""
    return config_from(read_values(path, overrides), str(path))


def config_from(values: Mapping[str, Any], where: str = "config") -> Config:
    """Checks names and types; `where` begins the messages."""
    train = {"train_dataset": None} | {name: value for name, value in values.items() if name != "rounds"}
    try:
        rounds = RoundsConfig(**_checked(values.get("rounds")))
        return Config(checked_config(train), rounds)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _checked(section: Any) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise UserError("rounds: a section of keys and values is missing" if section is None else
                        f"rounds is {section!r}; it takes keys and values")
    if not section.get("scorer"):
        raise UserError("rounds.scorer is missing; it takes module:function, the folder of a reward model, "
                        "implicit:FOLDER, or judge:openai:URL#MODEL")
    for name in section:
        if name not in _KEYS:
            raise no_such_key(name, "rounds.", _KEYS)
    return {name: convert(f"rounds.{name}", value, _KEYS[name].kind) for name, value in section.items()}


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys that differ between two `Config.to_dict()`s and that change what is learnt, with both values."""
    there, here = dict(saved), dict(now)
    before, after = dict(there.pop("rounds", None) or {}), dict(here.pop("rounds", None) or {})
    if not RoundsConfig(**after).one_schedule:  # then the learning rate does not depend on how many there are
        before["number"] = after["number"]
    return [*differing_keys(there, here), *(f"rounds.{line}" for line in differing_keys(before, after, _KEYS))]
