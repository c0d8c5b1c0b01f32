"""The training loop, flat: stages, steps, micro-batches.

    for stage in stages:                             sft, then rpo, ...; each from the weights the former ended with
        reference log-probs, once                    two floats a pair; from a file if they are there
        while step < steps:
            sample if asked, evaluate if due           the watch: fresh_samples.py, pair_metrics.py
            for batch in micro-batches:              one global batch: their losses and gradients add up to its own
                loss.backward()
            clip, update                             skipped where a gradient is NaN or inf
            log and save if due
    final weights, summary, report

Everything a step depends on is the configuration, the weights, the optimiser state and the random generators: the data
order and the learning rate are functions of (seed, step). So a run that resumes from a checkpoint goes on bitwise.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fastpref.data import Batch, Example, identity_of
from fastpref.errors import Stopped, TrainingError, UserError
from fastpref.files import PARTIAL, write_text
from fastpref.report.page import write_report

from . import checkpoint, guard, ranks, sharding
from .batch_order import BatchOrder
from .checkpoint import Saver, State, seed_everything
from .config import TrainConfig, differing_keys
from .display import Display, StepBar, evaluation_line, samples_line
from .evaluate import evaluate, exact_match, generate
from .fresh_samples import FreshSamples, check_prompts
from .kl_budget import over_budget
from .machine import device_name, peak_memory_mib
from .memory_estimate import check_fits
from .metrics_log import MetricsLog, NoLog, check_report_to
from .mfu import model_flops, peak_flops
from .micro_batches import baseline, collated, loss_inputs, totals_of
from .model import (
    Policy,
    check_saves,
    check_weights,
    exchanged,
    fingerprint,
    keep_merged,
    load_tokenizer,
    load_weights,
    pad_token,
    pick_device,
    save_model,
    weights_of,
)
from .optim import Updater, check_optimizer, learning_rate
from .pair_metrics import MetricSums, StartLogps, metrics_of_pairs, take_correlation, to_sums
from .positions import check_positions, longest_sequences
from .prompts import decoded_prompts
from .reference import ReferenceLogps
from .reference_cache import cached_logps, cached_splits
from .rendering import dated, keep_date
from .run_folder import LEFT, clear, reference_again, reference_at_start, refuse_removed, refuse_used
from .scorer import Scorer, load_scorer
from .source import adapter_lines, goes_on_with_adapter
from .stage_data import StageData, load_data
from .summary import show_summary, summarize
from .traits import save_config

MOST_SAMPLES = 12  # generations that the summary keeps, before and after


@dataclass
class Handover:
    """What a run that is one of several (fastpref/rounds) is handed in memory, and hands on."""

    policy: Policy  # with the weights to begin with; at the end with those it ends with
    tokenizer: PreTrainedTokenizerBase
    data: list[StageData] | None = None  # of its stages; None: what the configuration names
    reference: dict[str, torch.Tensor] | None = None  # weights that the loss compares with; None: as configured
    optimizer: dict[str, Any] | None = None  # states that the optimiser begins with; at the end those it ends with
    part: tuple[int, int] = (0, 1)  # (i, n): its learning rates are part i of n of one schedule
    exact_match: dict[str, float] = field(default_factory=dict)  # of the policy as given, where it is known
    generated: list[str] = field(default_factory=list)  # the texts it is of
    save_model: bool = True
    seconds: dict[str, float] = field(default_factory=dict)  # wall time: reference, training, evaluation, saving


@dataclass
class Run:
    """What all stages share."""

    dir: Path
    config: TrainConfig
    stages: Sequence[TrainConfig]
    data: list[StageData]
    tokenizer: PreTrainedTokenizerBase
    pad: int
    policy: Policy
    display: Display
    log: MetricsLog | NoLog
    stop: StopFlag
    state: State
    resumed: Path | None  # the checkpoint this run goes on from, until its stage has begun
    goes_on: bool  # from a checkpoint: what lies in the folder is its own
    handover: Handover
    alone: bool  # not one of several
    scorers: dict[str, Scorer] = field(default_factory=dict)  # of fresh samples, by their names in the configuration
    given_weights: dict[str, torch.Tensor] | None = None  # that `handover` came with, where fresh samples need them
    start: StartLogps = field(default_factory=lambda: StartLogps([]))  # of this stage
    saver: Saver = field(default_factory=Saver)


@contextmanager
def spent(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the time within to `seconds[what]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started


class StopFlag:
    """Set by the first SIGINT or SIGTERM; a second one aborts at once."""

    def __init__(self) -> None:
        self.signum = 0

    @contextmanager
    def listening(self, display: Display) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum: int, frame: Any) -> None:
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum
            display.say("finishing this step, then saving a checkpoint; once more to abort at once", "yellow")

        before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """All ranks stop where one was asked to."""
        self.signum = ranks.largest(self.signum)
        if self.signum:
            raise Interrupted

    def tick(self, show: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Between two forward passes: shows progress, and stops if asked to."""

        def call(done: int, of: int) -> None:
            self.check()
            show(done, of)

        return call


class Interrupted(Exception):
    """Raised by StopFlag.check where a signal has been received."""


def train(
    config: TrainConfig, *, resume: bool = False, display: Display | None = None, handover: Handover | None = None
) -> dict[str, Any]:
    """Runs all stages and returns the summary (also in output_dir/summary.json).

    output_dir then holds: model/ (what from_pretrained loads), metrics.jsonl, config.yaml, summary.json, report.html,
    checkpoints/ and reference/ (the cached reference log-probs).

    resume: go on from the newest checkpoint in output_dir, bitwise on the CPU; from the beginning if there is none.
    handover: a policy that is in memory already, and what else is not to be loaded; the run then prints no summary.

    Under torchrun the processes train one model, sharded (sharding.py): the same steps, whatever their number.

    Raises UserError (ValueError) for what the user can put right, TrainingError and SaveError for a run that
    cannot go on (what was saved stays), Stopped after SIGINT or SIGTERM once a checkpoint is saved.
    """
    with ranks.joined(config):
        if not ranks.is_first():
            with Path(os.devnull).open("w") as nowhere:
                return _train(config, resume, Display(Console(file=nowhere)), handover)
        return _train(config, resume, display or Display(), handover)


def _train(config: TrainConfig, resume: bool, display: Display, handover: Handover | None) -> dict[str, Any]:
    run_dir = Path(config.output_dir)
    check_report_to(config)
    stages = config.stage_configs()
    for stage in stages:
        check_optimizer(stage, pick_device())
    if resume and ranks.on_first((run_dir / "summary.json").is_file):
        return _already_complete(run_dir, config, display)
    stop = StopFlag()
    with ExitStack() as held, stop.listening(display):
        ranks.on_first(lambda: held.enter_context(checkpoint.lock(run_dir)) and None)
        newest = ranks.on_first(lambda: checkpoint.checkpoints(run_dir)[-1:]) if resume else []
        for folder in newest:
            checkpoint.verify(folder, display.say, together=True)
        resumed, state = ranks.on_first(lambda: _begins(run_dir, config, resume))
        seed_everything(config.seed)
        tokenizer = handover.tokenizer if handover else load_tokenizer(config)
        if handover is None:
            check_weights(config)
            check_saves(config, tokenizer)
        config = ranks.on_first(lambda: dated(config, tokenizer))
        ranks.on_first(lambda: keep_date(config))
        stages = config.stage_configs()
        data = handover.data if handover and handover.data else load_data(stages, tokenizer, display)
        if resumed and state.step and state.data != identity_of(data[state.stage].train):
            raise UserError(f"{resumed}: train_dataset has other examples now than when it was saved")
        alone = handover is None
        if handover is None:
            check_positions(stages, longest_sequences(stages, data), display)
            if pick_device().type == "cuda":
                check_fits(config, ranks.size(), torch.cuda.get_device_properties(pick_device()).total_memory)
            handover = Handover(sharding.load(config, tokenizer, resumed), tokenizer)
        given_weights = None
        if not alone and not handover.reference and any(stage.sample_steps for stage in stages):
            given_weights = checkpoint.snapshot(weights_of(handover.policy))
        if resumed and not alone:
            load_weights(handover.policy, resumed)
        policy = handover.policy
        scorers = _prepare_sampling(stages, data, policy, tokenizer, held)
        ranks.on_first(lambda: _prepare(run_dir, config, resumed, state))
        if alone:
            ranks.on_first(lambda: keep_merged(config, tokenizer, run_dir))
            where = f"{ranks.size()} ranks, each on " if ranks.size() > 1 else ""
            display.say(f"{describe(policy)} on {where}{device_name(policy.device)}; run folder {run_dir}")
            for line in adapter_lines(config):
                display.say(line)
            if model_flops(policy) is None:
                display.say("mfu: unknown, for experts, or layers other than attention, whose work is not counted")
        if resumed:
            display.say(f"going on from {resumed}")
        elif resume and alone:
            display.say(f"{run_dir}: no checkpoint there yet, starting from the beginning")
        log = MetricsLog(run_dir, config, state.metrics_bytes, state.global_step) if ranks.is_first() else NoLog()
        pad = pad_token(tokenizer)
        run = Run(run_dir, config, stages, data, tokenizer, pad, policy, display, log, stop, state, resumed,
                  goes_on=bool(resumed), handover=handover, alone=alone, scorers=scorers,
                  given_weights=given_weights)
        try:
            for index in range(state.stage, len(stages)):
                run_stage(run, index)
            run.saver.wait()
            return finish(run)
        finally:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # asked twice: at once
                run.saver.join()
            log.close()


def _prepare_sampling(
    stages: Sequence[TrainConfig], data: Sequence[StageData], policy: Policy, tokenizer: PreTrainedTokenizerBase,
    held: ExitStack,
) -> dict[str, Scorer]:
    """Checks what fresh samples are to be taken from, and loads what scores them."""
    generators, scorers = checkpoint.random_state(), {}
    for stage, its in zip(stages, data, strict=True):
        if stage.sample_steps:
            its.prompts = its.prompts or decoded_prompts(tokenizer, its.eval or its.train, stage.sample_prompts)
            check_prompts(stage, policy, tokenizer, its.prompts)
        if stage.scorer and stage.scorer not in scorers:
            size = stage.per_device_eval_batch_size
            scorer = load_scorer(stage.scorer, timeout=stage.scorer_timeout, batch_size=size,
                                 trust_remote_code=stage.trust_remote_code)
            scorers[stage.scorer] = held.enter_context(scorer)
    checkpoint.restore_random_state(generators)
    return scorers


def _begins(run_dir: Path, config: TrainConfig, resume: bool) -> tuple[Path | None, State]:
    """The checkpoint to go on from, and where it stands."""
    found = checkpoint.checkpoints(run_dir) if resume else []
    if found:
        state, saved = checkpoint.read_state(found[-1])
        different = differing_keys(saved, config.to_dict())
        if different:
            raise UserError(f"{found[-1]} is of another configuration: {'; '.join(different)}")
        return found[-1], state
    if not resume:
        refuse_used(run_dir, config)
    refuse_removed(run_dir, LEFT, config)
    return None, State()


def _prepare(run_dir: Path, config: TrainConfig, resumed: Path | None, state: State) -> None:
    if not resumed:
        clear(run_dir)
    elif (run_dir / "metrics.jsonl").stat().st_size < state.metrics_bytes:
        raise UserError(f"{run_dir}/metrics.jsonl is shorter than when {resumed.name} was saved")
    checkpoint.clean_up(run_dir)
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))


def _already_complete(run_dir: Path, config: TrainConfig, display: Display) -> dict[str, Any]:
    different = differing_keys(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")), config.to_dict())
    if different:
        raise UserError(f"{run_dir} holds a complete run of another configuration: {'; '.join(different)}")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    display.say(f"{run_dir}: this run is complete")
    show_summary(display, run_dir, summary)
    return summary


def describe(policy: Policy) -> str:
    total = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trainable().values())
    size = f"{total / 1e9:.2f}B" if total >= 1e9 else f"{total / 1e6:.2f}M"
    share = "" if trained == total else f" ({100 * trained / total:.2g} % trained)"
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    batches = {"padded": "padded batches", "packed": "packed batches", "shared": "packed batches with shared prompts"}
    because = f" ({policy.padded_because})" if policy.padded_because else ""
    notes = "".join(f"; {note}" for note in policy.notes)
    what = type(policy.model).__name__
    return f"{what}, {size} parameters{share}, {dtype}, {batches[policy.layout]}{because}{notes}"


# ---- reference -------------------------------------------------------------------------------------------------------


def reference_logps(run: Run, index: int, order: BatchOrder) -> tuple[ReferenceLogps, ReferenceLogps | None]:
    """Of the stage's examples and of the held-out ones: from the run's files where they fit, else computed and written.

    The reference is `ref_model_name_or_path`, or the weights that the run was given for it, or the policy as the stage
    found it. Leaves the random generators alone.
    """
    own = run.handover.reference
    with spent(run.handover.seconds, "reference"), exchanged(run.policy, own) if own else nullcontext():
        return _reference_logps(run, index, order)


def _reference_logps(run: Run, index: int, order: BatchOrder) -> tuple[ReferenceLogps, ReferenceLogps | None]:
    stage, data, state = run.stages[index], run.data[index], run.state
    generators = checkpoint.random_state()
    source: Policy | None = None
    if state.step == 0 or run.handover.reference:
        source = reference_at_start(stage, run.tokenizer, run.policy)
        state.reference = fingerprint(source.model)
    found: dict[str, ReferenceLogps] = {}

    def the_reference() -> Policy:
        nonlocal source
        source = source or _starting_policy(run, index)
        return source

    for split in cached_splits(run.config, run.dir, index, stage, data, order):
        found[split.name] = cached_logps(
            split, run.tokenizer, state.reference or "", run.policy, the_reference, run.display, run.stop.tick,
            replace=run.goes_on or stage.overwrite_output_dir,
        )
    del source
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    checkpoint.restore_random_state(generators)
    return found["train"], found.get("eval")


def _check_reference(run: Run, index: int, examples: Sequence[Example], order: BatchOrder) -> None:
    generators, stage = checkpoint.random_state(), run.stages[index]
    said = guard.check(run.policy, stage, examples, order.some(4), run.pad)
    checkpoint.restore_random_state(generators)
    if run.alone:
        run.display.say(f"{stage.name}: {said}")


def _starting_policy(run: Run, index: int) -> Policy:
    """The reference of a stage that has moved on since, made again because its cached log-probs are gone."""
    return reference_again(run.config, index, run.dir, run.tokenizer, run.state.reference)


# ---- one stage -------------------------------------------------------------------------------------------------------


def run_stage(run: Run, index: int) -> None:
    """Trains `run.policy` through one stage, from `run.state` on."""
    stage, data, state, policy = run.stages[index], run.data[index], run.state, run.policy
    name, loss = stage.name or "", stage.loss_fn
    order = BatchOrder(stage, data.train, run.config.seed + index)
    steps = order.steps
    part, parts = run.handover.part

    def rate_at(step: int) -> float:
        return learning_rate(stage, part * steps + step, parts * steps)

    updater, flops = Updater(policy.trainable().values(), stage), model_flops(policy)
    policy.model.train()
    resumed, run.resumed = run.resumed, None
    if index == 0 and state.step == 0 and run.handover.optimizer:
        updater.optimizer.load_state_dict(run.handover.optimizer)
    if resumed:
        tensors = checkpoint.read_tensors(resumed)
        if state.step:
            sharding.load_optimizer(resumed, policy, updater.optimizer, tensors["optimizer"])
        checkpoint.restore_random_state(tensors["random"])
    state.data = identity_of(data.train)
    state.history.setdefault(name, {})
    examples, held_out, train_ref, eval_ref = data.train, data.eval, None, None
    run.start = StartLogps(held_out)
    if resumed:
        run.start.restore(tensors)
    try:
        if loss.needs_reference:
            train_ref, eval_ref = reference_logps(run, index, order)
            examples = train_ref.attach(examples)
            held_out = eval_ref.attach(held_out) if eval_ref else held_out
        elif state.step == 0:  # what an implicit reward compares with
            state.reference = fingerprint(policy.model)
        state.history[name]["reference"] = state.reference
        if train_ref and stage.check_reference and not (state.step or stage.ref_model_name_or_path):
            if not run.handover.reference:
                _check_reference(run, index, examples, order)
        fresh = _fresh(run, index)
        with run.display.steps(name, state.step, steps) as bar:
            while True:
                if fresh and fresh.is_due(state, last=state.step == _end(run, index, steps)):
                    _sample(run, index, fresh, order)
                due = _evaluation_is_due(stage, state.step, _end(run, index, steps))
                if held_out and state.evaluated != state.step and due:
                    run_evaluation(run, index, held_out, eval_ref, order)
                if state.history[name].get("kl_budget", {}).get("step") == state.step:
                    save_checkpoint(run, updater.optimizer)
                if state.step == _end(run, index, steps):
                    if state.window:  # the KL budget has ended the stage between two lines
                        _log(run, bar, name, order.epoch(state.step), rate_at(state.step - 1))
                    break
                run.stop.check()
                run.saver.check()
                started = time.perf_counter()
                first, micro_batches = order.of_step(state.step)
                batches = collated(examples, micro_batches, run.pad, stage.kind, policy.layout)
                kl = []
                if loss.needs_kl and train_ref:
                    kl = [train_ref.of_batch(first + i) for i in range(len(batches))]
                rate = rate_at(state.step)
                values = train_step(policy, updater, stage, batches, rate, kl)
                seconds = time.perf_counter() - started
                _count(state, values, batches, seconds, flops.of(batches) if flops else math.nan)
                run.handover.seconds["training"] = run.handover.seconds.get("training", 0.0) + seconds
                if state.skipped_in_a_row >= stage.max_skipped_steps:
                    raise TrainingError(_why_stopped(run, name))
                if state.step % stage.logging_steps == 0 or state.step == steps:
                    _log(run, bar, name, order.epoch(state.step), rate)
                bar.advance(state.step)
                if stage.save_steps and state.step % stage.save_steps == 0 and state.step < steps:
                    save_checkpoint(run, updater.optimizer)
    except Interrupted:
        where = f"{name} step {state.step}/{steps}"
        if state.step or index:
            where += f", saved in {save_checkpoint(run, updater.optimizer)}; --resume goes on from there"
            run.saver.wait()
        raise Stopped(run.stop.signum, f"stopped at {where}") from None
    finally:
        updater.close()
    state.history[name] |= {
        "steps": state.step, "num_tokens": state.num_tokens, "seconds": state.seconds, "skipped_steps": state.skipped,
    }
    if not run.alone and index + 1 == len(run.stages):
        run.handover.optimizer = updater.optimizer.state_dict()
    if index + 1 < len(run.stages):
        run.state = State(
            stage=index + 1, global_step=state.global_step, history=state.history, generated=state.generated
        )
        save_checkpoint(run, None)


def train_step(
    policy: Policy,
    updater: Updater,
    stage: TrainConfig,
    batches: Sequence[Batch],
    rate: float,
    ref_kl_logps: Sequence[torch.Tensor],
) -> dict[str, float]:
    """One optimiser step on the global batch that `batches` are the parts of. Synchronises once, at its end (where
    weights are updated in backward, also before it and once a weight).

    Returns the means over the global batch, its loss, and the gradient norm before clipping; and the sums that
    `take_correlation` takes. Where loss or norm is not finite the weights stay as they are.
    """
    loss, totals = stage.loss_fn, totals_of(batches)
    kl_logps = ref_kl = None
    if loss.needs_kl:
        kl_logps, ref_kl = baseline(policy, batches, ref_kl_logps)
    mine = [(batch.to(policy.device), counts) for batch, counts in ranks.share(batches)]
    sums, total = MetricSums(), torch.zeros((), device=policy.device)
    updater.begin(rate)
    for batch, counts in mine:
        out = policy.compute_loss(batch, loss, totals, **loss_inputs(loss, batch, kl_logps, ref_kl))
        value = out.loss if counts else 0 * out.loss
        if not updater.in_backward or math.isfinite(value.item()):
            value.backward()
        total += value.detach()
        sums.add(out.metrics, counts)
        sums.add(metrics_of_pairs(stage.kind, out, batch, batch.ref_logps), counts)
    ranks.add_up_gradients(updater.parameters)
    values = sums.read(loss=ranks.total(total), grad_norm=updater.gradient_norm())
    to_sums(values, float(totals.pairs))
    updater.end(math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
    return values


def _count(state: State, values: dict[str, float], batches: Sequence[Batch], seconds: float, flops: float) -> None:
    tokens, scored, saved = (
        sum(getattr(batch, name) for batch in batches) for name in ("processed_tokens", "num_tokens", "saved_tokens")
    )
    state.step += 1
    state.global_step += 1
    state.num_tokens += tokens
    state.seconds += seconds
    finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    window = {"tokens": float(tokens), "scored_tokens": float(scored), "saved_tokens": float(saved), "seconds": seconds}
    window["flops"] = flops
    window |= values if finite else {}
    for name, value in window.items():
        if not math.isnan(value):
            total, count = state.window.get(name, (0.0, 0))
            state.window[name] = [total + value, count + 1]


def _log(run: Run, bar: StepBar, name: str, epoch: float, rate: float) -> None:
    """Means over the steps since the last line."""
    state = run.state
    seconds, flops = state.window.pop("seconds")[0], state.window.pop("flops", (0.0, 0))[0]
    tokens, scored, saved = (state.window.pop(name)[0] for name in ("tokens", "scored_tokens", "saved_tokens"))
    totals = {key: total for key, (total, _) in state.window.items()}
    values = take_correlation(totals)
    values = {key: total / state.window[key][1] for key, total in totals.items()} | values
    values |= {
        "learning_rate": rate,
        "num_tokens": state.num_tokens,
        "tokens_per_s": tokens / seconds,
        "scored_tokens_per_s": scored / seconds,
        "peak_memory_mib": peak_memory_mib(run.policy.device),
    }
    if run.policy.layout == "shared":
        values["saved_tokens_per_s"] = saved / seconds
    peak = peak_flops(device_name(run.policy.device), run.policy.compute_dtype)
    if flops and peak:
        values["mfu"] = flops / seconds / peak / ranks.size()
    if state.skipped:
        values["skipped_steps"] = state.skipped
    state.window = {}
    run.log.write(name, "train", state.step, epoch, values, state.global_step)
    bar.logged(state.step, values)
    _check_budget(run, "train", values.get("watch/kl"))


def _why_stopped(run: Run, name: str) -> str:
    run.saver.wait()
    saved = checkpoint.checkpoints(run.dir)
    return (
        f"{name} step {run.state.step}: loss or gradients were NaN or inf {run.state.skipped_in_a_row} steps in a row; "
        + (f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved")
    )


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer | None) -> Path:
    """Saves where the run stands, then removes checkpoints beyond the limit; goes on while a thread writes a copy."""
    state, stage = run.state, run.stages[run.state.stage]
    name = stage.name or ""
    run.saver.wait()
    path = run.dir / "checkpoints" / checkpoint.folder_name(state.stage, name, state.step)
    if ranks.on_first(path.is_dir):  # just resumed from it, or saved at this step already
        return path
    state.metrics_bytes = run.log.size()
    if ranks.size() > 1 and not run.config.use_peft:  # an adapter is whole on every rank
        _save_sharded(run, path, optimizer)
        return path
    tensors, weights = checkpoint.tensors_of(optimizer) | run.start.tensors(), weights_of(run.policy)
    beside = stage.optimizer != "adamw_offload"  # its states fill the host's memory: no room for a copy
    if beside:
        tensors, weights = checkpoint.snapshot(tensors), checkpoint.snapshot(weights)
    content, keep = asdict(state), _kept(state)

    def write(folder: Path) -> None:
        save_model(run.policy, run.tokenizer, folder, weights)
        checkpoint.write_state(folder, content, run.config.to_dict(), tensors)

    def save() -> None:
        checkpoint.save(path, write)
        checkpoint.remove_old(run.dir, run.config.save_total_limit, keep)

    if beside and ranks.size() == 1:
        run.saver.start(save)
    else:
        ranks.on_first(save)
    return path


def _save_sharded(run: Run, path: Path, optimizer: torch.optim.Optimizer | None) -> None:
    """All ranks write their parts beside; then the first one makes the checkpoint of them."""
    parts = path.with_name(f"{PARTIAL}{checkpoint.SHARDED}-{path.name}")
    ranks.on_first(lambda: parts.mkdir(parents=True, exist_ok=True))
    known = sharding.save(run.policy, optimizer, parts)
    content, keep = asdict(run.state), _kept(run.state)

    def write(folder: Path) -> None:
        os.rename(parts, folder / checkpoint.SHARDED)
        run.policy.model.config.save_pretrained(folder)
        save_config(run.policy.model, folder)
        run.tokenizer.save_pretrained(folder)
        tensors = checkpoint.tensors_of(None) | run.start.tensors()
        checkpoint.write_state(folder, content, run.config.to_dict(), tensors)

    def save() -> None:
        checkpoint.save(path, write, known)
        checkpoint.remove_old(run.dir, run.config.save_total_limit, keep)

    ranks.on_first(save)


def _kept(state: State) -> set[str]:
    """Checkpoints that save_total_limit does not count: of a stage's KL budget, and of its best reward so far."""
    found = (history.get(what, {}).get("checkpoint") for history in state.history.values()
             for what in ("kl_budget", "best"))
    return {name for name in found if name}


# ---- the watch -------------------------------------------------------------------------------------------------------


def _end(run: Run, index: int, steps: int) -> int:
    """The stage's last step: where its KL budget has ended it, else that of its schedule."""
    budget = run.state.history[run.stages[index].name or ""].get("kl_budget", {})
    return int(budget["step"]) if budget.get("action") == "stop" else steps


def _check_budget(run: Run, split: str, kl: float | None) -> None:
    """Takes down where the stage's KL budget is first reached; the checkpoint follows before the next step."""
    state, stage = run.state, run.stages[run.state.stage]
    name = stage.name or ""
    place = checkpoint.folder_name(state.stage, name, state.step)
    found = over_budget(stage, state, split, kl, bool(run.data[state.stage].eval), place)
    if found and "kl_budget" not in state.history[name]:
        state.history[name]["kl_budget"] = found
        then = "the stage ends here" if found["action"] == "stop" else "the stage goes on"
        run.display.say(f"{name} {state.step} KL budget of {found['budget']:g} nats reached: {found['kl']:.3g} "
                        f"({found['of']}); checkpoint {place} is kept, {then}", "yellow")


def _fresh(run: Run, index: int) -> FreshSamples | None:
    stage = run.stages[index]
    if not stage.sample_steps:
        return None
    generators = checkpoint.random_state()
    compared = _compared(run, index)
    checkpoint.restore_random_state(generators)
    return FreshSamples(stage, run.tokenizer, run.data[index].prompts, compared, run.scorers.get(stage.scorer or ""))


def _compared(run: Run, index: int) -> Callable[[], AbstractContextManager[Policy]]:
    """The reference of fresh samples. A new adapter's is the model without it, and costs nothing; a model of its own
    (ref_model_name_or_path) stays on the device while the stage lasts; else the stage's first weights wait in host
    memory (LoRA's: the adapter's), and change places with the policy's."""
    stage, state, policy = run.stages[index], run.state, run.policy
    weights = run.handover.reference or run.given_weights
    if stage.ref_model_name_or_path:
        source = _starting_policy(run, index) if state.step else reference_at_start(stage, run.tokenizer, policy)
        return lambda: nullcontext(source)
    if weights is None and run.config.use_peft and index == 0 and not goes_on_with_adapter(run.config):
        return lambda: _without_adapter(policy)
    if weights is None and state.step:
        weights = checkpoint.snapshot(weights_of(_starting_policy(run, index)))
    elif weights is None:
        weights = checkpoint.snapshot(weights_of(policy))
    return lambda: _with_weights(policy, weights)


@contextmanager
def _without_adapter(policy: Policy) -> Iterator[Policy]:
    with policy.model.disable_adapter():
        yield policy


@contextmanager
def _with_weights(policy: Policy, weights: dict[str, torch.Tensor]) -> Iterator[Policy]:
    with exchanged(policy, weights):
        yield policy


def _sample(run: Run, index: int, fresh: FreshSamples, order: BatchOrder) -> None:
    """KL and reward of fresh samples, into a line of metrics; unless they take too long, and wait."""
    stage, state = run.stages[index], run.state
    name, history = stage.name or "", state.history[stage.name or ""]
    seed = (run.config.seed << 32) + (index << 24) + state.step
    with spent(run.handover.seconds, "watch"), run.display.counting(f"{name}: sampling") as show:
        values = fresh.measure(run.policy, state, seed, run.stop.tick(show))
    record = history.setdefault("sampling", {"taken": 0})
    record["seconds"] = state.sampling["seconds"]
    if values is None:
        if not record.get("waited"):
            takes = f"they take about {state.sampling['expected']:.1f} s"
            run.display.say(f"{name} {state.step} fresh samples wait: {takes}, more than sample_time_share="
                            f"{stage.sample_time_share:g} leaves yet", "cyan")
        record["waited"] = record.get("waited", 0) + 1
        return
    record["taken"] += 1
    if values.get("reward", -math.inf) > history.get("best", {}).get("reward", -math.inf):
        place = checkpoint.folder_name(index, name, state.step)
        history["best"] = {"step": state.step, "checkpoint": place} | {
            key: values[key] for key in ("reward", "reward_error", "kl") if key in values
        }
    run.log.write(name, "sample", state.step, order.epoch(state.step), values, state.global_step)
    run.display.say(f"{name} {state.step}/{order.steps} fresh samples | {samples_line(values)}", "cyan")
    _check_budget(run, "sample", values["kl"])


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _evaluation_is_due(stage: TrainConfig, step: int, steps: int) -> bool:
    return step in (0, steps) or (stage.eval_steps is not None and step % stage.eval_steps == 0)


def run_evaluation(
    run: Run, index: int, held_out: Sequence[Example], eval_ref: ReferenceLogps | None, order: BatchOrder
) -> None:
    with spent(run.handover.seconds, "evaluation"):
        _evaluate(run, index, held_out, eval_ref, order)


def _evaluate(
    run: Run, index: int, held_out: Sequence[Example], eval_ref: ReferenceLogps | None, order: BatchOrder
) -> None:
    stage, state = run.stages[index], run.state
    name, size = stage.name or "", stage.per_device_eval_batch_size
    with run.display.counting(f"{name}: evaluating") as show:
        tick = run.stop.tick(show)
        if state.step == 0:
            run.start = StartLogps(held_out)
        start = run.start if state.step == 0 or run.start.known else None
        values = evaluate(run.policy, held_out, stage.kind, stage.loss_fn, size, run.pad, eval_ref, tick, start)
    _check_budget(run, "eval", values.get("watch/kl"))
    last = state.step == _end(run, index, order.steps)
    if stage.eval_generate and (last or state.step == 0):
        values |= _exact_match(run, index)
    history = state.history[name]
    if state.step == 0:
        history["before"], history["generated"] = values, state.generated
    if last:
        history["after"] = values
    state.evaluated = state.step
    run.log.write(name, "eval", state.step, order.epoch(state.step), values, state.global_step)
    if state.step == 0 and not stage.ref_model_name_or_path:  # the policy is its own reference: nothing to tell
        trivial = ("kl", "rewards/", "watch/kl", "watch/chosen")
        values = {key: value for key, value in values.items() if not key.startswith(trivial)}
    run.display.say(f"{name} {state.step}/{order.steps} held-out | {evaluation_line(values)}", "cyan")


def _exact_match(run: Run, index: int) -> dict[str, float]:
    """Generates, unless these very weights answered these very questions at the end of the stage before."""
    stage, data, state = run.stages[index], run.data[index], run.state
    if index == 0 and state.step == 0 and run.handover.exact_match:
        state.generated = run.handover.generated
        return run.handover.exact_match
    if index and state.step == 0 and data.questions == run.data[index - 1].questions:
        before, now = run.stages[index - 1], stage
        after = state.history.get(before.name or "", {}).get("after", {})
        if before.eval_max_new_tokens == now.eval_max_new_tokens and "exact_match" in after:
            return {key: value for key, value in after.items() if key.startswith("exact_match")}
    with run.display.counting(f"{stage.name}: generating") as show:
        prompts = [question.prompt_ids for question in data.questions]
        texts = generate(
            run.policy, run.tokenizer, prompts, stage.per_device_eval_batch_size, stage.eval_max_new_tokens,
            run.stop.tick(show),
        )
    state.generated = texts[:MOST_SAMPLES]
    return exact_match(data.questions, texts)


# ---- the end ---------------------------------------------------------------------------------------------------------


def finish(run: Run) -> dict[str, Any]:
    """Final weights, summary and report; prints what improved."""
    weights = None
    if ranks.size() > 1:
        weights = weights_of(run.policy) if run.config.use_peft else sharding.whole_weights(run.policy)
    with spent(run.handover.seconds, "saving"):
        summary, report = ranks.on_first(lambda: _write_results(run, weights))
    if not run.alone:
        return summary
    show_summary(run.display, run.dir, summary)
    run.display.say(f"model   {run.dir / 'model'}\nreport  {report}")
    return summary


def _write_results(run: Run, weights: dict[str, torch.Tensor] | None) -> tuple[dict[str, Any], Path]:
    if run.handover.save_model:
        checkpoint.save(run.dir / "model", lambda folder: save_model(run.policy, run.tokenizer, folder, weights))
    run.log.size()
    summary = summarize(run.stages, run.data[-1], run.state, run.policy.device)
    write_text(run.dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary, write_report(run.dir)
