"""The rounds, flat: each one samples, scores, pairs and trains, and leaves a folder from which a later run goes on.

    warm-up stages, or the model as it is               start/model
    best-of-n on held-out prompts                       start/evaluation.jsonl
    for each round:                                     round-001/
        sample from the policy, score, pair             responses.jsonl, pairs.jsonl
        train                                           train/: a run of `fastpref train`, report and all
        best-of-n on held-out prompts                   evaluation.jsonl
        counts, rewards, wall time                      round.json: the round is complete
    summary.json, report.html

Under torchrun the ranks go through this together: the policy is sharded, and whole on each while they sample, in turns;
what lies in the folder, the first one writes, and tells the others what it finds there.

There is one policy in memory from beginning to end. What else is needed of other weights (the reference, a restart from
the initial ones) is a copy in host memory that changes places with the policy's, tensor by tensor.

A killed run goes on from the last weights on the disk. What was sampled since is there and is not sampled again; what
was trained since is trained again, from the same data in the same order, so that the result is bitwise the same on a
CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Examples, Invalid, identity_of, load_records
from fastpref.errors import Stopped, UserError
from fastpref.files import crc32_of, replacing, write_text
from fastpref.report.page import write_report
from fastpref.train import checkpoint, ranks, sharding
from fastpref.train.best_of_n import best_of_n
from fastpref.train.checkpoint import snapshot
from fastpref.train.compiled import check_compiles
from fastpref.train.config import TrainConfig
from fastpref.train.display import Display
from fastpref.train.loop import Trained, introduction, stage_inputs, train_policy
from fastpref.train.machine import device_name, versions
from fastpref.train.memory_estimate import check_fits
from fastpref.train.metrics_log import check_report_to
from fastpref.train.model import (
    BASE,
    Policy,
    check_ids,
    check_saves,
    check_weights,
    exchanged,
    keep_merged,
    load_tokenizer,
    load_weights,
    pick_device,
    save_model,
    set_weights,
    settings_of,
    weights_of,
)
from fastpref.train.optim import check_optimizer
from fastpref.train.positions import SequenceLength, check_positions, longest_sequences
from fastpref.train.prompts import Prompt, decoded_prompts
from fastpref.train.rendering import dated, keep_date, rendering_of
from fastpref.train.run import Interrupted, StopFlag, spent
from fastpref.train.run_folder import refuse_removed
from fastpref.train.sample import Engine, Sample, Sampling, sample
from fastpref.train.scorer import Scorer, load_scorer
from fastpref.train.source import source_of_run
from fastpref.train.stage import Answers, StageInput
from fastpref.train.stage_data import StageData, load_data
from fastpref.train.traits import follows_length
from fastpref.train.vllm_engine import VLLM, uses_vllm

from .collect import Prompts, Scored, collect, read_prompts, rivals
from .config import Config, differing
from .pairing import Pair, block, count, make_pairs, offline_count, scores
from .report import judged, round_lines, show_table, write_page
from .served import SERVED, Served, reach

ASKED = ("eval_dataset", "eval_generate", "eval_generate_samples", "eval_max_new_tokens", "max_length")  # exact match
# And the rounds: what a run leaves in output_dir
OURS = ("start", "model", "reference", SERVED, BASE, "summary.json", "report.html")


@dataclass
class Session:
    """What all rounds share. The policy's weights change from round to round, and so does what is marked *."""

    dir: Path
    config: Config
    stage: TrainConfig
    display: Display
    stop: StopFlag
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    held_out: Prompts | None  # for best-of-n; None: no such evaluation
    data: StageData  # the held-out examples; as `train` the offline ones
    offline_prompts: list[Prompt]  # of their records
    vllm: bool
    policy: Policy
    served: Served | None  # what samples instead of `policy`
    initial: dict[str, torch.Tensor] | None = None  # weights before the first round, where a round wants them
    at: int = 0  # * the round that is under way
    trained: int = 0  # * the round whose weights the policy has; 0: the initial ones
    saved: bool = True  # * whether these are on the disk
    optimizer: dict[str, Any] | None = None  # * states that training goes on with
    answers: dict[int, Answers] = field(default_factory=dict)  # * of a round's weights, where exact match is asked for

    def folder(self, number: int) -> Path:
        return self.dir / f"round-{number:03d}" if number else self.dir / "start"


def rounds(config: Config, *, resume: bool = False, display: Display | None = None) -> dict[str, Any]:
    """Runs all rounds and returns the summary (also in output_dir/summary.json).

    resume: go on with what output_dir holds, bitwise on a CPU; from the beginning if it holds nothing.

    Raises UserError for what the user can put right: before anything is sampled, but for a first round without a
    single pair; Stopped after a signal; and what training raises.
    """
    own = {f"rounds.{key}": value for key, value in config.rounds.to_dict().items()}
    with ranks.joined(config.train, own), ranks.heard(display) as its:
        return _rounds(config, resume, its)


def _rounds(config: Config, resume: bool, display: Display) -> dict[str, Any]:
    run_dir = Path(config.train.output_dir)
    check_report_to(config.train)
    for stage in config.train.stage_configs():
        check_optimizer(stage, pick_device())
    vllm = takes_vllm(config)
    ranks.on_first(lambda: reach(config.rounds))
    stop = StopFlag()
    with ExitStack() as held, stop.listening(display):
        ranks.on_first(lambda: held.enter_context(checkpoint.lock(run_dir)))
        goes_on = ranks.on_first(lambda: _may_begin(run_dir, config, resume))
        if goes_on and (summary := ranks.on_first(lambda: _all_there(run_dir, config, display))):
            return summary
        scorer = ranks.everywhere(partial(
            load_scorer, config.rounds.scorer, timeout=config.rounds.scorer_timeout,
            batch_size=config.stage.per_device_eval_batch_size, trust_remote_code=config.train.trust_remote_code,
            judging=config.rounds.judging,
        ))
        held.enter_context(scorer)
        session = _open(run_dir, config, display, stop, scorer, vllm, goes_on)
        ranks.on_first(lambda: _prepare(session, goes_on))
        ranks.on_first(lambda: keep_merged(config.train, session.tokenizer, run_dir))
        try:
            _start(session)
            for number in range(1, config.rounds.number + 1):
                if not _is_complete(session, number):
                    run_round(session, number)
                if _is_last(session, number):
                    break
        except Interrupted:
            where = f"round {session.at} of {config.rounds.number}" if session.at else "the start"
            raise Stopped(stop.signum, f"stopped in {where}; --resume goes on from there") from None
        return _finish(session, number)


# ---- the beginning ---------------------------------------------------------------------------------------------------


def _may_begin(run_dir: Path, config: Config, resume: bool) -> bool:
    """Whether there is something to go on with. Raises UserError for a folder that is not to be written to."""
    there = run_dir / "config.yaml"
    if not there.is_file() or (config.train.overwrite_output_dir and not resume):
        own = {"rounds.prompts": config.rounds.prompts, "rounds.scorer": config.rounds.scorer}
        refuse_removed(run_dir, (*OURS, "round-[0-9]*"), config.train, **own)
        return False
    if not resume:
        raise UserError(f"output_dir {run_dir} holds a run already: --resume goes on with it, "
                        "overwrite_output_dir=true starts over")
    saved = yaml.safe_load(there.read_text(encoding="utf-8"))
    if "rounds" not in saved:
        raise UserError(f"output_dir {run_dir} holds a run of `fastpref train`, no rounds; set another output_dir")
    different = differing(saved, config.to_dict())
    if different:
        raise UserError(f"{run_dir} holds rounds of another configuration: {'; '.join(different)}")
    return True


def _all_there(run_dir: Path, config: Config, display: Display) -> dict[str, Any] | None:
    """The summary of rounds that are complete, shown again."""
    if not (run_dir / "summary.json").is_file():
        return None
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    if len(summary["rounds"]) < config.rounds.number and not summary["ended_by_kl_budget"]:
        return None
    display.say(f"{run_dir}: these rounds are complete")
    show_table(display, summary)
    return summary


def _prepare(session: Session, goes_on: bool) -> None:
    run_dir = session.dir
    for path in () if goes_on else (*run_dir.glob("round-[0-9]*"), *(run_dir / name for name in OURS)):
        if path.is_dir():
            checkpoint.remove(path)
        else:
            path.unlink(missing_ok=True)
    checkpoint.clean_up(run_dir)
    write_text(run_dir / "config.yaml", yaml.safe_dump(session.config.to_dict(), sort_keys=False))


def takes_vllm(config: Config) -> bool:
    """Not where rotary factors are one choice a run (traits.fix_rope): vLLM makes its own; nor under torchrun."""
    if (count := ranks.started()) > 1:
        if config.rounds.engine == "vllm":
            raise UserError(f"rounds.engine is 'vllm', which samples in one process, and torchrun started {count}: "
                            "leave it out, or let vLLM serve (rounds.sampler=openai:URL)")
        return False
    if config.train.use_peft or config.rounds.sampler or not uses_vllm(config.rounds.engine):
        return False
    settings = settings_of(config.train, source_of_run(config.train))
    if settings is None or not follows_length(settings):
        return True
    if config.rounds.engine == "vllm":
        raise UserError("rounds.engine is 'vllm', which chooses LongRoPE and dynamic NTK factors by itself, unlike "
                        "training: set engine=transformers")
    return False


class Given(NamedTuple):
    """What rounds begin with, read and checked."""

    config: Config  # with the chat template's date
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    held_out: Prompts | None  # for best-of-n; None: no such evaluation
    data: StageData


def read(config: Config, display: Display) -> Given:
    """Raises UserError for all that can be known before there is a policy."""
    tokenizer = load_tokenizer(config.train)
    check_weights(config.train)
    check_saves(config.train, tokenizer)
    check_compiles(config.train, tokenizer)
    config = replace(config, train=dated(config.train, tokenizer))
    settings, stage = config.rounds, config.stage
    room = stage.max_length - settings.max_new_tokens
    room = min(room, stage.max_prompt_length or room)
    source = stage.train_dataset if settings.prompts is None else settings.prompts
    how = stage.truncation_mode, rendering_of(stage)
    prompts = read_prompts(source, tokenizer, room, *how, "prompts", display)
    held_out = None
    if stage.eval_dataset is not None and settings.eval_prompts != 0:
        held_out = read_prompts(stage.eval_dataset, tokenizer, room, *how, "held-out prompts", display)
        held_out = held_out.take(range(len(held_out.ids))[: settings.eval_prompts])
    check_ids(config.train, tokenizer, [*prompts.ids, *(held_out.ids if held_out else ())])
    (data,) = load_data([stage], tokenizer, display, held_out_only=not settings.offline_ratio)
    _check_prompts(config, prompts, display)
    asked = f"the longest prompt with rounds.max_new_tokens={settings.max_new_tokens}"
    most = max(len(ids) for part in (prompts, held_out) if part is not None for ids in part.ids)
    sampled = SequenceLength(asked, most + settings.max_new_tokens, "lower it (together at most {})")
    check_positions([stage], [sampled, *longest_sequences([stage], [data])], display)
    return Given(config, tokenizer, prompts, held_out, data)


def _open(run_dir: Path, config: Config, display: Display, stop: StopFlag, scorer: Scorer, vllm: bool,
          goes_on: bool) -> Session:
    """Reads the data, loads the policy once, with the newest weights there are."""
    checkpoint.seed_everything(config.train.seed)  # as train does: random weights are the same there and here
    config, tokenizer, prompts, held_out, data = given = ranks.everywhere(lambda: read(config, display))
    if ranks.size() > 1:
        _check_same(given)
    ranks.on_first(lambda: keep_date(config.train))
    settings, stage = config.rounds, config.stage
    invalid = Invalid() if stage.invalid_records == "drop" else None
    records = load_records(stage.train_dataset, invalid=invalid) if settings.offline_ratio else []
    offline = [record.prompt for record in records]
    folders = [run_dir / "start" / "model"]
    folders += [run_dir / f"round-{number:03d}" / "train" / "model" for number in range(1, settings.number + 1)]
    there = ranks.on_first(lambda: [
        i for i, folder in enumerate(folders) if goes_on and _is_trained(folder.parent, i, config)
    ])
    newest = max(there, default=None)
    first = None if newest is None else folders[0] if config.wants_initial else folders[newest]
    policy = sharding.load(config.train, tokenizer, first)
    for line in introduction(policy, config.train, run_dir):
        display.say(line)
    served = Served(run_dir / SERVED, settings, tokenizer) if settings.sampler else None
    session = Session(run_dir, config, stage, display, stop, scorer, tokenizer, prompts, held_out, data, offline, vllm,
                      policy, served)
    for name, part, n in (("prompts", prompts, settings.num_generations), ("held-out", held_out, settings.eval_n)):
        if part is not None:
            sample(policy, tokenizer, part.ids, _sampling(session, n, 0, name))  # checks, and generates nothing
    if newest is not None:
        _keep_initial(session)
        if newest:
            if config.wants_initial:
                load_weights(policy, folders[newest])
            _went_on(session, newest)
        display.say(f"going on from {folders[newest]}")
    return session


def _check_same(given: Given) -> None:
    """For ranks: that all have read the same, and that what they hold while they sample fits."""
    data = given.data
    read = given.prompts, given.held_out, identity_of(data.train), identity_of(data.eval)
    mine = hashlib.sha256(repr(read).encode()).hexdigest()
    for other, found in enumerate(every := ranks.told(mine)):
        if found != every[0]:
            raise UserError(f"rank {other} reads other prompts than rank 0: they must be the same on all nodes")
    if (device := pick_device()).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        check_fits(given.config.train, ranks.size(), memory, generates=True)


def _check_prompts(config: Config, prompts: Prompts, display: Display) -> None:
    """Enough of them for a round and its ranks; and the longest example there may be has to fit into a micro-batch:
    found out before it is sampled."""
    stage, settings, count = config.stage, config.rounds, ranks.started()
    a_round = settings.prompts_per_round or len(prompts.ids)
    if a_round > len(prompts.ids):
        raise UserError(f"rounds.prompts_per_round is {a_round}, but there are {len(prompts.ids)}")
    if count > a_round:
        raise UserError(f"{count} ranks, but a round has {a_round} prompt{'s' * (a_round > 1)} "
                        f"(rounds.prompts_per_round): raise it, or start at most {a_round}")
    batches = -(-a_round * settings.num_generations // settings.generation_batch_size)
    if batches < count and not settings.sampler:
        size = max(1, a_round * settings.num_generations // count)
        display.say(f"a round's responses are {batches} batch{'es' * (batches > 1)}, so {count - batches} of {count} "
                    f"ranks have none to sample: lower rounds.generation_batch_size to {size}", "yellow")
    if stage.max_tokens_per_batch:
        responses = 2 if stage.kind == "pair" else 1
        prompt = max(map(len, prompts.ids)) * (1 if stage.prefix_sharing else responses)
        most = prompt + responses * settings.max_new_tokens
        if most > stage.max_tokens_per_batch:
            raise UserError(f"max_tokens_per_batch is {stage.max_tokens_per_batch}, but the longest prompt and "
                            f"responses of max_new_tokens={settings.max_new_tokens} make up to {most:,} tokens")


def _said(path: Path) -> Any:
    """What a JSON file says, None where it is not there: as the first rank finds it."""
    return ranks.on_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)


def _save(session: Session, path: Path) -> None:
    """The policy."""
    whole = sharding.to_save(session.policy)
    ranks.on_first(lambda: checkpoint.save(
        path, lambda part: save_model(session.policy, session.tokenizer, part, whole)
    ))


def _is_trained(folder: Path, number: int, config: Config) -> bool:
    """Whether the weights (and states) that a round ended with are on the disk."""
    needed = ["model"]
    if number:
        needed += ["summary.json"] + ["optimizer.pt"] * config.rounds.one_schedule
    elif config.warm_up:
        needed.append("summary.json")
    return all((folder / name).exists() for name in needed)


def _start(session: Session) -> None:
    """What comes before the first round: the warm-up stages, or the model as it is; and how good that is."""
    config, folder = session.config, session.folder(0)
    ranks.on_first(lambda: checkpoint.clean_up(folder))
    if not ranks.on_first(lambda: _is_trained(folder, 0, config)):
        if config.warm_up:
            warm_up = replace(config.train, stages=config.warm_up, output_dir=str(folder))
            stages = ranks.everywhere(lambda: stage_inputs(warm_up, session.tokenizer, session.display))
            _train_in(folder, session, warm_up, stages)
        else:
            _save(session, folder / "model")
        _keep_initial(session)
    warmed_up = _said(folder / "summary.json")
    if warmed_up:
        last, own = config.train.stage_configs()[-2], session.stage
        if all(getattr(last, key) == getattr(own, key) for key in ASKED):
            _keep_answers(session, 0, folder)
    if _said(folder / "round.json") is None:
        seconds: dict[str, float] = {}
        values: dict[str, Any] = {"best_of_n": _evaluate(session, 0, seconds)}
        if warmed_up:
            values["after"] = warmed_up["after"]
        values |= {"round": 0, "seconds": seconds}
        ranks.on_first(lambda: write_text(folder / "round.json", json.dumps(values, indent=1) + "\n"))


def _keep_initial(session: Session) -> None:
    if session.config.wants_initial:
        session.initial = snapshot(weights_of(session.policy))


def _went_on(session: Session, number: int) -> None:
    """The policy has the weights of round `number`: what else goes with them."""
    session.trained = number
    folder = session.folder(number) / "train"
    _keep_answers(session, number, folder)
    if session.config.rounds.one_schedule:
        path = folder / "optimizer.pt"
        ranks.on_first(lambda: _check_crc(path))
        # of several ranks each takes its part of what is mapped
        session.optimizer = torch.load(path, map_location="cpu", weights_only=True, mmap=ranks.size() > 1)


def _check_crc(path: Path) -> None:
    crc = path.with_suffix(".crc32")
    if crc.is_file() and crc.read_text(encoding="utf-8").strip() != crc32_of(path):
        raise UserError(f"{path}: is not what was saved (its checksum differs); delete {path.parent} to train that "
                        "round again")


def _keep_answers(session: Session, number: int, folder: Path, when: str = "after") -> None:
    """What a training run says of the weights it ended with, or began with; nothing where it did not ask."""
    if session.stage.eval_generate:
        summary = _said(folder / "summary.json")
        found = {key: value for key, value in summary[when].items() if key.startswith("exact_match")}
        session.answers[number] = Answers(found, [text[when] for text in summary["samples"]])


# ---- one round -------------------------------------------------------------------------------------------------------


def _is_complete(session: Session, number: int) -> bool:
    """Whether there is nothing left to do for a round: its weights are those of the policy, or older."""
    return number <= session.trained and _said(session.folder(number) / "round.json") is not None


def _is_last(session: Session, number: int) -> bool:
    """Whether a KL budget has ended the rounds: where each goes on from the one before, away from one reference, the
    next would begin at the budget. Otherwise the budget is one for each round."""
    config = session.config
    if config.rounds.start_from == "initial" or not config.of_initial:
        return False
    values = _said(session.folder(number) / "round.json")
    return bool(values.get("kl_budget", {}).get("action") == "stop")


def run_round(session: Session, number: int) -> None:
    settings, display = session.config.rounds, session.display
    folder, started = session.folder(number), time.perf_counter()
    seconds: dict[str, float] = {}
    session.at = number
    ranks.on_first(lambda: checkpoint.clean_up(folder))
    again = _said(folder / "round.json") is not None  # the weights it ended with were not saved: trained again
    goes_on = again or ranks.on_first((folder / "responses.jsonl").is_file)
    chosen = block(len(session.prompts.ids), settings.prompts_per_round, number - 1, session.config.train.seed)
    prompts = session.prompts.take(chosen)
    display.say(f"round {number}/{settings.number}: {len(chosen):,} prompts x {settings.num_generations} responses"
                + (" (trained again from saved responses)" if again else ""), "bold")
    before = session.scorer.total()

    responses, pairs, dropped = _responses_and_pairs(session, number, prompts, seconds)
    counts, rewards = count(responses), [scores(own(of_prompt)) for of_prompt in responses]
    values: dict[str, Any] = {
        "round": number, "counts": counts, "pairs": sum(map(len, pairs)), "dropped": dict(sorted(dropped.items())),
        "reward": _mean([score for of_prompt in rewards for score in of_prompt if score is not None]),
        "reward_error": next((best.error for best in best_of_n(rewards) if math.isfinite(best.error)), None),
    }
    after = session.scorer.total()
    if after.counts:  # win rates, whose mean is a half
        values["reward"] = values["reward_error"] = None
        values["judge"] = {name: n - before.counts[name] for name, n in after.counts.items()}
    if after.failures - before.failures:
        display.say(f"round {number}: scorer so far: {after.report()}", "yellow")
    with spent(seconds, "pairing"):
        examples, lines = _examples(session, number, prompts, pairs)
    values["offline"] = len(examples) - values["pairs"] * (2 if session.stage.kind == "kto" else 1)
    if values["pairs"]:
        with spent(seconds, "pairing"):
            ranks.on_first(lambda: write_text(folder / "pairs.jsonl", "".join(lines)))
        if session.trained < number:
            session.stop.check()
            values["training"] = _train(session, number, examples, seconds)
        else:  # ended between its training and its evaluation
            values["training"] = _said(folder / "train" / "summary.json")
        values["training"] = {key: values["training"][key] for key in ("before", "after", "stages", "verdict")}
        values["after"] = values["training"]["after"]
        (of_stage,) = values["training"]["stages"].values()
        if "kl_budget" in of_stage:
            values["kl_budget"] = of_stage["kl_budget"]
    else:
        why = _why_none(counts, dropped)
        if number == 1:
            raise UserError(f"round 1: none of the {len(chosen):,} prompts makes a pair: {why}")
        display.say(f"round {number}: none of the {len(chosen):,} prompts makes a pair ({why}); nothing is trained",
                    "yellow")
        if number - 1 in session.answers:
            session.answers[number] = session.answers[number - 1]
        session.trained = number
    values["best_of_n"] = _evaluate(session, number, seconds)
    if again:
        return
    total = time.perf_counter() - started
    values["seconds"] = seconds | {"between": total - sum(seconds.values()), "total": total}
    values["resumed"] = goes_on

    def complete() -> None:
        _tidy(session, number)
        write_text(folder / "round.json", json.dumps(values, indent=1) + "\n")

    ranks.on_first(complete)
    for line in round_lines(values, settings.number):
        display.say(line, "cyan")


def _responses_and_pairs(
    session: Session, number: int, prompts: Prompts, seconds: dict[str, float]
) -> tuple[list[Scored], list[list[Pair]], Counter[str]]:
    """Samples and scores; pairs are made of each prompt as soon as it is scored."""
    settings, folder = session.config.rounds, session.folder(number)
    pairs: list[list[Pair]] = [[] for _ in prompts.ids]
    dropped: Counter[str] = Counter()
    two = settings.pairing == "policy_reference"
    seed = session.config.train.seed

    def pair(index: int, responses: Scored) -> None:
        with spent(seconds, "pairing"):
            rng = random.Random(f"fastpref pairing {seed} {number} {index}")
            pairs[index], why = make_pairs(
                responses, settings.pairing, min_gap=settings.min_gap, min_score=settings.min_score, rng=rng
            )
            dropped.update(why)

    def sampled(name: str, **more: Any) -> list[Scored]:
        sampling = _sampling(session, settings.num_generations, number, name)
        path = folder / (f"{name}.jsonl")
        return _collect(session, path, prompts, sampling, f"round {number}: {name}", seconds, **more)

    if not two:
        return sampled("responses", each=pair), pairs, dropped
    own = sampled("responses")
    assert session.initial is not None
    with exchanged(session.policy, session.initial):
        theirs = sampled(
            "reference_responses", of_reference=True, each=lambda index, responses: pair(index, own[index] + responses)
        )
    return [a + b for a, b in zip(own, theirs, strict=True)], pairs, dropped


def _collect(session: Session, path: Path, prompts: Prompts, sampling: Sampling, what: str, seconds: dict[str, float],
             **more: Any) -> list[Scored]:
    group = max(1, sampling.batch_size // sampling.n)

    def source(done: Collection[int]) -> Generator[tuple[int, list[Sample]], None, None]:
        with _engine(session) as engine, session.display.counting(what) as show:
            tick = session.stop.tick(show)
            yield from sample(session.policy, session.tokenizer, prompts.ids, sampling, tick, engine, done)

    return collect(path, prompts, source, session.scorer, group=group, seconds=seconds, **more)


@contextmanager
def _engine(session: Session) -> Iterator[Engine | None]:
    """What generates: None, the policy itself; a server; or vLLM over a copy of the policy's weights, while the policy
    waits in host memory."""
    if session.served:
        yield session.served.engine(session.policy, session.prompts.ids)
        return
    if not session.vllm:
        yield None
        return
    policy, folder = session.policy, session.dir / "vllm"
    checkpoint.save(folder, lambda part: save_model(policy, session.tokenizer, part))
    policy.model.to("cpu")
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info()
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    try:
        with VLLM(folder, session.tokenizer, dtype, gpu_memory_utilization=0.95 * free / whole) as engine:
            yield engine
    finally:
        policy.model.to(policy.device)
        checkpoint.remove(folder)


def _sampling(session: Session, n: int, number: int, name: str) -> Sampling:
    settings = session.config.rounds
    digest = hashlib.sha256(f"fastpref rounds {session.config.train.seed} {number} {name}".encode()).digest()
    return Sampling(
        n=n, temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens,
        batch_size=settings.generation_batch_size, seed=int.from_bytes(digest[:7], "big"),
    )


def _examples(
    session: Session, number: int, prompts: Prompts, pairs: Sequence[Sequence[Pair]]
) -> tuple[list[Example], list[str]]:
    """What the round trains on, token ids as they were sampled, and the lines of pairs.jsonl: its own, then offline."""
    kind, tokenizer, settings = session.stage.kind, session.tokenizer, session.config.rounds
    examples: list[Example] = []
    lines: list[str] = []

    def add(example: Example, prompt: Prompt, **more: Any) -> None:
        examples.append(example)
        lines.append(_line(example, prompt, tokenizer, **more))

    for index, of_prompt in enumerate(pairs):
        ids, shown = prompts.ids[index], prompts.shown[index]
        for pair in of_prompt:
            chosen, rejected = pair.chosen, pair.rejected
            if rejected is None:
                add(Example(index, ids, (chosen.ids,)), shown, scores=[chosen.score])
            elif kind == "kto":
                add(Example(index, ids, (chosen.ids,), desirable=True), shown, scores=[chosen.score])
                add(Example(index, ids, (rejected.ids,), desirable=False), shown, scores=[rejected.score])
            else:
                scores = [chosen.score, rejected.score]
                add(Example(index, ids, (chosen.ids, rejected.ids)), shown, scores=scores)
    offline = session.data.train
    wanted = offline_count(len(examples), settings.offline_ratio, len(offline))
    rng = random.Random(f"fastpref offline {session.config.train.seed} {number}")
    for i in sorted(rng.sample(range(len(offline)), wanted)):
        add(offline[i], session.offline_prompts[offline[i].record_id], offline=True)
    return examples, lines


def _line(example: Example, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **more: Any) -> str:
    """A record that `fastpref train` reads, and beside it the tokens that the round trained on."""
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in example.responses]
    names = ("chosen", "rejected") if len(texts) == 2 else ("completion",)
    content: dict[str, Any] = {"prompt": prompt} | dict(zip(names, texts, strict=True))
    if example.desirable is not None:
        content["label"] = example.desirable
    content |= more | {"prompt_ids": example.prompt_ids, "response_ids": list(example.responses)}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _train(session: Session, number: int, examples: list[Example], seconds: dict[str, float]) -> dict[str, Any]:
    """One run of `fastpref train` on the examples; the policy then has its weights."""
    settings, stage = session.config.rounds, session.stage
    folder = session.folder(number) / "train"
    begins = 0 if settings.start_from == "initial" else number - 1  # with the weights of which round
    reference = None
    if stage.loss_fn.needs_reference and not stage.ref_model_name_or_path:
        if session.config.of_initial and begins:
            reference = session.initial
        elif not session.config.of_initial and begins < number - 1:
            reference = snapshot(weights_of(session.policy))
    if settings.start_from == "initial" and session.trained:
        assert session.initial is not None
        set_weights(session.policy, session.initial)
    config = replace(  # one reference_dir for all: the log-probs of the held-out pairs may still be right
        stage, output_dir=str(folder), train_dataset=str(folder.parent / "pairs.jsonl"), overwrite_output_dir=True,
        reference_dir=stage.reference_dir or str(session.dir / "reference"), seed=session.config.train.seed + number,
    )
    (of_stage,) = config.stage_configs()
    data, compared = replace(session.data, train=Examples.of(examples)), None
    if stage.sample_steps:
        prompts = data.prompts or decoded_prompts(session.tokenizer, data.eval or data.train, stage.sample_prompts)
        data, compared = replace(data, prompts=prompts), reference or snapshot(weights_of(session.policy))
    given = StageInput(
        0, of_stage, data, answers=session.answers.get(begins), reference=reference, compared=compared,
        optimizer=session.optimizer, part=(number - 1, settings.number) if settings.one_schedule else (0, 1),
    )
    session.optimizer = None  # the stage's own from here on
    save = number % settings.save_rounds == 0 or number == settings.number
    trained = _train_in(folder, session, config, [given], save)
    session.trained, session.saved = number, save
    if begins not in session.answers:
        _keep_answers(session, begins, folder, "before")
    _keep_answers(session, number, folder)
    for what, took in trained.seconds.items():
        seconds[what] = seconds.get(what, 0.0) + took
    if settings.one_schedule:
        session.optimizer = trained.optimizer
        if save:
            with spent(seconds, "saving"):
                _save_optimizer(folder / "optimizer.pt", trained.optimizer)
    return trained.summary


def _train_in(folder: Path, session: Session, config: TrainConfig, stages: Sequence[StageInput],
              save: bool = True) -> Trained:
    if _said(folder / "summary.json") is not None:  # trained before, and the weights are not there
        ranks.on_first(lambda: checkpoint.remove(folder))
    return train_policy(session.policy, session.tokenizer, config, stages, session.display, save=save)


def _save_optimizer(path: Path, states: dict[str, Any]) -> None:
    whole = sharding.whole_states(states)

    def write() -> None:
        with replacing(path) as part:
            torch.save(whole, part)
            write_text(path.with_suffix(".crc32"), crc32_of(part) + "\n")  # first: without optimizer.pt it says nothing

    ranks.on_first(write)


def _tidy(session: Session, number: int) -> None:
    """What nobody goes back to: checkpoints within a round that is complete, optimiser states of rounds before it."""
    folder = session.folder(number) / "train"
    checkpoint.clean_up(folder)
    if (folder / "summary.json").is_file():
        (of_stage,) = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["stages"].values()
        kept = {of_stage.get(what, {}).get("checkpoint") for what in ("kl_budget", "best")}  # the watch's
        for path in checkpoint.checkpoints(folder):
            if path.name not in kept:
                checkpoint.remove(path)
    if (folder / "optimizer.pt").is_file():
        for earlier in range(1, number):
            (session.folder(earlier) / "train" / "optimizer.pt").unlink(missing_ok=True)


def _evaluate(session: Session, number: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Best of 1, 2, 4, ... of samples for the held-out prompts."""
    if session.held_out is None:
        return []
    path = session.folder(number) / "evaluation.jsonl"
    scorer = session.scorer.against(lambda: rivals(session.folder(0) / path.name)) if number else session.scorer
    with spent(seconds, "evaluation"):
        sampling = _sampling(session, session.config.rounds.eval_n, number, "held-out")
        what = f"{'start' if not number else f'round {number}'}: best of {sampling.n}"
        found = _collect(replace(session, scorer=scorer), path, session.held_out, sampling, what, {})
    best = best_of_n([scores(of_prompt) for of_prompt in found])
    return [vars(b) | {"error": b.error if math.isfinite(b.error) else None} for b in best]


def own(responses: Scored) -> Scored:
    """Those of the policy."""
    return [response for response in responses if not response.of_reference]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _why_none(counts: dict[str, int], dropped: Counter[str]) -> str:
    parts = [f"{n:,} {reason}" for reason, n in dropped.most_common()]
    for name in ("empty", "duplicates", "failed"):
        parts += [f"{counts[name]:,} of {counts['responses']:,} responses {name}"] * bool(counts[name])
    return "; ".join(parts)


# ---- the end ---------------------------------------------------------------------------------------------------------


def _finish(session: Session, last: int) -> dict[str, Any]:
    """last: the number of the last round."""
    run_dir, folders = session.dir, [session.folder(0), *(session.folder(i) / "train" for i in range(1, last + 1))]
    every = [_said(session.folder(i) / "round.json") for i in range(last + 1)]
    start, found = every[0], every[1:]
    if "after" not in start:
        before = found[0]["training"]["before"]
        start["after"] = {key: value for key, value in before.items() if key.startswith("exact_match")}
    model = run_dir / "model"
    if not session.saved:  # the last rounds trained nothing, and the one before them was not to be saved
        _save(session, model)
    else:
        model = ranks.on_first(lambda: next(
            folders[i] for i in range(last, -1, -1) if _is_trained(folders[i], i, session.config)
        )) / "model"
    summary = {
        "start": start, "rounds": found, "ended_by_kl_budget": _is_last(session, last),
        "model": str(model.relative_to(run_dir)), "device": device_name(session.policy.device), "versions": versions(),
        "verdict": judged(every).content(),
    }

    def write() -> Path:
        for folder in folders[1:]:  # killed between a run's summary and its report
            if (folder / "summary.json").is_file() and not (folder / "report.html").is_file():
                write_report(folder)
        write_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        return write_page(run_dir)

    report = ranks.on_first(write)
    show_table(session.display, summary)
    session.display.say(f"model   {model}\nreport  {report}")
    return summary
