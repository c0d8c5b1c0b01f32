"""A training run, flat: its folder, what it loads, its stages, what it leaves.

    data, policy; or what is in memory already       fastpref/rounds trains one policy again and again
    for stage in stages:                             sft, then rpo, ...; each from the weights the former ended with
        run_stage                                    the loop itself: stage.py
    final weights, summary, report

A run that was ended, by a signal or `kill -9`, goes on from its newest checkpoint, bitwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from fastpref.data import identity_of
from fastpref.errors import Stopped, UserError
from fastpref.files import write_text
from fastpref.report.page import write_report

from . import checkpoint, ranks, sharding
from .checkpoint import State, seed_everything
from .compiled import check_compiles
from .config import TrainConfig, differing_keys, lengthened
from .display import Display
from .fresh_samples import check_prompts
from .machine import device_name
from .memory_estimate import check_fits
from .metrics_log import MetricsLog, NoLog, check_report_to
from .mfu import model_flops
from .model import (
    Policy,
    check_saves,
    check_weights,
    keep_merged,
    load_tokenizer,
    load_weights,
    pick_device,
    save_model,
)
from .optim import check_optimizer
from .positions import check_positions, longest_sequences
from .quantized import parameters_of
from .rendering import dated, keep_date
from .run import Interrupted, Run, StopFlag, save_checkpoint, spent
from .run_folder import LEFT, clear, refuse_removed, refuse_used
from .scorer import Scorer, load_scorer
from .source import adapter_lines
from .stage import Answers, StageInput, StageResult, run_stage
from .stage_data import load_data
from .summary import show_summary, summarize, write_summary


@dataclass(frozen=True)
class Place:
    """A run's folder that is held, and where the run in it begins."""

    dir: Path
    state: State
    resumed: Path | None  # the checkpoint that `state` is of; None: from the beginning
    stop: StopFlag
    held: ExitStack  # closes with the run


@dataclass(frozen=True)
class Trained:
    """What `train_policy` hands back; the policy has the weights."""

    summary: dict[str, Any]
    optimizer: dict[str, Any]  # states that the last stage has ended with
    seconds: dict[str, float]  # wall time: reference, training, watch, evaluation, saving


def train(config: TrainConfig, *, resume: bool = False, display: Display | None = None) -> dict[str, Any]:
    """Runs all stages and returns the summary (also in output_dir/summary.json).

    output_dir then holds: model/ (what from_pretrained loads), metrics.jsonl, config.yaml, summary.json, report.html,
    checkpoints/ and reference/ (the cached reference log-probs).

    resume: go on from the newest checkpoint in output_dir, bitwise on the CPU; from the beginning if there is none.

    Under torchrun the processes train one model, sharded (sharding.py): the same steps, whatever their number.

    Raises UserError (ValueError) for what the user can put right, TrainingError and SaveError for a run that
    cannot go on (what was saved stays), Stopped after SIGINT or SIGTERM once a checkpoint is saved.
    """
    with ranks.joined(config), ranks.heard(display) as its:
        return _train(config, resume, its)


def _train(config: TrainConfig, resume: bool, display: Display) -> dict[str, Any]:
    run_dir = Path(config.output_dir)
    check_report_to(config)
    for stage in config.stage_configs():
        check_optimizer(stage, pick_device())
    if resume and ranks.on_first(lambda: _has_ended(run_dir, config, display)):
        return _already_complete(run_dir, config, display)
    with _opened(config, resume, display) as place:
        tokenizer = ranks.everywhere(lambda: _checked_tokenizer(config))
        config = ranks.on_first(lambda: dated(config, tokenizer))
        ranks.on_first(lambda: keep_date(config))
        stages = ranks.everywhere(lambda: stage_inputs(config, tokenizer, display))
        _check_same_data(place, stages)
        configs = [stage.config for stage in stages]
        check_positions(configs, longest_sequences(configs, [stage.data for stage in stages]), display)
        if pick_device().type == "cuda":
            check_fits(config, ranks.size(), torch.cuda.get_device_properties(pick_device()).total_memory)
        policy = sharding.load(config, tokenizer, place.resumed)
        with _running(place, config, policy, tokenizer, stages, display, alone=True) as run:
            ranks.on_first(lambda: keep_merged(config, tokenizer, run_dir))
            _introduce(run)
            if place.resumed:
                display.say(f"going on from {place.resumed}")
            elif resume:
                display.say(f"{run_dir}: no checkpoint there yet, starting from the beginning")
            state = _run_stages(run, stages, place).state
            summary, report = _finish(run, stages, state)
            show_summary(display, run_dir, summary)
            display.say(f"model   {run_dir / 'model'}\nreport  {report}")
            return summary


def train_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, stages: Sequence[StageInput],
                 display: Display, *, save: bool = True) -> Trained:
    """A run in its own folder, as `train` makes it, of a policy that is in memory: fastpref/rounds. Goes on from the
    newest checkpoint there. save: whether the policy's weights are written at the end."""
    with _opened(config, True, display) as place:
        _check_same_data(place, stages)
        if place.resumed:
            load_weights(policy, place.resumed)
        with _running(place, config, policy, tokenizer, stages, display, alone=False) as run:
            if place.resumed:
                display.say(f"going on from {place.resumed}")
            last = _run_stages(run, stages, place)
            summary, _ = _finish(run, stages, last.state, save)
            return Trained(summary, last.optimizer.state_dict(), run.seconds)


def stage_inputs(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, display: Display) -> list[StageInput]:
    """Of all stages, their data read and tokenised."""
    stages = config.stage_configs()
    every = zip(stages, load_data(stages, tokenizer, display))
    return [StageInput(index, stage, data) for index, (stage, data) in enumerate(every)]


# ---- the beginning ---------------------------------------------------------------------------------------------------


@contextmanager
def _opened(config: TrainConfig, resume: bool, display: Display) -> Iterator[Place]:
    """Holds the run's folder, listens to signals, and seeds the random generators."""
    run_dir, stop = Path(config.output_dir), StopFlag()
    with ExitStack() as held, stop.listening(display):
        ranks.on_first(lambda: held.enter_context(checkpoint.lock(run_dir)) and None)
        for folder in ranks.on_first(lambda: checkpoint.checkpoints(run_dir)[-1:]) if resume else []:
            checkpoint.verify(folder, display.say, together=True)
        resumed, state = ranks.on_first(lambda: _begins(run_dir, config, resume))
        seed_everything(config.seed)
        try:
            yield Place(run_dir, state, resumed, stop, held)
        except Interrupted as where:
            raise Stopped(stop.signum, f"stopped at {where}") from None


def _begins(run_dir: Path, config: TrainConfig, resume: bool) -> tuple[Path | None, State]:
    """The checkpoint to go on from, and where it stands."""
    found = checkpoint.checkpoints(run_dir) if resume else []
    if found:
        state, saved = checkpoint.read_state(found[-1])
        if (run_dir / "summary.json").is_file() or not differing_keys(_config_of(run_dir), config.to_dict()):
            saved = lengthened(saved, config.to_dict())
        different = differing_keys(saved, config.to_dict())
        if different:
            raise UserError(f"{found[-1]} is of another configuration: {'; '.join(different)}")
        return found[-1], state
    if not resume:
        refuse_used(run_dir, config)
    refuse_removed(run_dir, LEFT, config)
    return None, State()


def _checked_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """And what is known of the model from its files, before they are loaded."""
    tokenizer = load_tokenizer(config)
    check_weights(config)
    check_saves(config, tokenizer)
    check_compiles(config, tokenizer)
    return tokenizer


def _check_same_data(place: Place, stages: Sequence[StageInput]) -> None:
    state = place.state
    if ranks.size() > 1:
        of_ranks = ranks.told([(identity_of(s.data.train), identity_of(s.data.eval)) for s in stages])
        for other, found in enumerate(of_ranks):
            if found != of_ranks[0]:
                raise UserError(f"rank {other} reads other examples than rank 0: train_dataset and eval_dataset must "
                                "be the same on all nodes")
    if place.resumed and state.step and state.data != identity_of(stages[state.stage].data.train):
        raise UserError(f"{place.resumed}: train_dataset has other examples now than when it was saved")


@contextmanager
def _running(place: Place, config: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase,
             stages: Sequence[StageInput], display: Display, alone: bool) -> Iterator[Run]:
    """From here on the folder is written to; at the end no save is under way any more."""
    scorers = _scorers(policy, tokenizer, stages, place.held)
    ranks.on_first(lambda: _prepare(place, config))
    state = place.state
    log = MetricsLog(place.dir, config, state.metrics_bytes, state.global_step) if ranks.is_first() else NoLog()
    run = Run(place.dir, config, tokenizer, policy, display, log, place.stop, scorers, bool(place.resumed), alone)
    try:
        yield run
    finally:
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # asked twice: at once
            run.saver.join()
        log.close()


def _scorers(policy: Policy, tokenizer: PreTrainedTokenizerBase, stages: Sequence[StageInput],
             held: ExitStack) -> dict[str, Scorer]:
    """What scores fresh samples; checks what these are to be taken from."""
    generators, scorers = checkpoint.random_state(), dict[str, Scorer]()
    for stage in stages:
        config = stage.config
        if config.sample_steps:
            check_prompts(config, policy, tokenizer, stage.data.prompts)
        if config.scorer and config.scorer not in scorers:
            size = config.per_device_eval_batch_size
            load = partial(load_scorer, config.scorer, timeout=config.scorer_timeout, batch_size=size,
                           trust_remote_code=config.trust_remote_code)
            one = ranks.everywhere(load if ranks.is_first() else partial(Scorer, config.scorer))  # it alone is asked
            scorers[config.scorer] = held.enter_context(one)
    checkpoint.restore_random_state(generators)
    return scorers


def _prepare(place: Place, config: TrainConfig) -> None:
    run_dir = place.dir
    if not place.resumed:
        clear(run_dir)
    elif (run_dir / "metrics.jsonl").stat().st_size < place.state.metrics_bytes:
        raise UserError(f"{run_dir}/metrics.jsonl is shorter than when {place.resumed.name} was saved")
    checkpoint.clean_up(run_dir)
    (run_dir / "summary.json").unlink(missing_ok=True)  # of a run that had ended, and goes on
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))


def _introduce(run: Run) -> None:
    for line in introduction(run.policy, run.config, run.dir):
        run.display.say(line)
    if model_flops(run.policy) is None:
        run.display.say("mfu: unknown, for experts, or layers other than attention, whose work is not counted")


def introduction(policy: Policy, config: TrainConfig, run_dir: Path) -> list[str]:
    where = f"{ranks.size()} ranks, each on " if ranks.size() > 1 else ""
    return [f"{describe(policy)} on {where}{device_name(policy.device)}; run folder {run_dir}", *adapter_lines(config)]


def _config_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _has_ended(run_dir: Path, config: TrainConfig, display: Display) -> bool:
    """Whether a run is complete, and not to go on to more steps or epochs than it had."""
    if not (run_dir / "summary.json").is_file():
        return False
    there, now = _config_of(run_dir), config.to_dict()
    if not differing_keys(there, now) or differing_keys(lengthened(there, now), now):
        return True
    if not checkpoint.checkpoints(run_dir):
        raise UserError(f"{run_dir}: is complete, and kept no checkpoint to go on from (save_steps); train its model "
                        f"further in a run of its own: model_name_or_path={run_dir}/model")
    display.say("a longer run now: it goes on from its last checkpoint, with the learning rates of the longer schedule",
                "yellow")
    return False


def _already_complete(run_dir: Path, config: TrainConfig, display: Display) -> dict[str, Any]:
    different = differing_keys(_config_of(run_dir), config.to_dict())
    if different:
        raise UserError(f"{run_dir} holds a complete run of another configuration: {'; '.join(different)}")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    display.say(f"{run_dir}: this run is complete")
    show_summary(display, run_dir, summary)
    return summary


def describe(policy: Policy) -> str:
    total = parameters_of(policy.model)
    trained = sum(p.numel() for p in policy.trainable().values())
    size = f"{total / 1e9:.2f}B" if total >= 1e9 else f"{total / 1e6:.2f}M"
    share = "" if trained == total else f" ({100 * trained / total:.2g} % trained)"
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    batches = {"padded": "padded batches", "packed": "packed batches", "shared": "packed batches with shared prompts"}
    because = f" ({policy.padded_because})" if policy.padded_because else ""
    notes = "".join(f"; {note}" for note in policy.notes)
    what = type(policy.model).__name__
    return f"{what}, {size} parameters{share}, {dtype}, {batches[policy.layout]}{because}{notes}"


# ---- the stages ------------------------------------------------------------------------------------------------------


def _run_stages(run: Run, stages: Sequence[StageInput], place: Place) -> StageResult:
    """From where the run begins to the last one's end, each from what the former ended with."""
    given = replace(stages[place.state.stage], state=place.state, resumed=place.resumed)
    while True:
        result = run_stage(run, _answered(given, stages))
        if given.index + 1 == len(stages):
            run.saver.wait()
            return result
        given, state = stages[given.index + 1], result.state
        state = State(given.index, global_step=state.global_step, history=state.history, generated=state.generated)
        del result  # its optimiser
        save_checkpoint(run, given.config, state, None, {})
        given = replace(given, state=state)


def _answered(given: StageInput, stages: Sequence[StageInput]) -> StageInput:
    """With the answers that these very weights gave to these very questions at the end of the stage before."""
    if not given.index or given.state.step:
        return given
    before, state = stages[given.index - 1], given.state
    after = state.history.get(before.config.name or "", {}).get("after", {})
    asked = [(stage.data.questions, stage.config.eval_max_new_tokens) for stage in (before, given)]
    if asked[0] != asked[1] or "exact_match" not in after:
        return given
    found = {key: value for key, value in after.items() if key.startswith("exact_match")}
    return replace(given, answers=Answers(found, state.generated))


# ---- the end ---------------------------------------------------------------------------------------------------------


def _finish(run: Run, stages: Sequence[StageInput], state: State, save: bool = True) -> tuple[dict[str, Any], Path]:
    """Final weights, summary and report; the summary, and where the report is."""
    weights = sharding.to_save(run.policy)

    def write() -> tuple[dict[str, Any], Path]:
        if save:
            checkpoint.save(run.dir / "model", lambda folder: save_model(run.policy, run.tokenizer, folder, weights))
        run.log.size()
        configs = [stage.config for stage in stages]
        scorer = run.scorers.get(configs[-1].scorer or "")
        summary = summarize(configs, stages[-1].data, state, run.policy.device, scorer)
        write_summary(run.dir, summary)
        return summary, write_report(run.dir)

    with spent(run.seconds, "saving"):
        return ranks.on_first(write)
