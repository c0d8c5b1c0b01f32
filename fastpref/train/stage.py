"""One stage, flat: what it is given, the loop, what it hands back.

    reference log-probs, once                        two floats a pair; from a file if they are there
    while step < end:                                the schedule's last, or where the KL budget is reached
        sample if asked, evaluate if due             the watch: fresh_samples.py, pair_metrics.py
        for batch in micro-batches:                  one global batch: their losses and gradients add up to its own
            loss.backward()
        clip, update                                 skipped where a gradient is NaN or inf
        log and save if due

Everything a step depends on is the configuration, the weights, the optimiser state and the random generators: the data
order and the learning rate are functions of (seed, step). So a run that resumes from a checkpoint goes on bitwise.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpref.data import Batch, identity_of
from fastpref.errors import TrainingError
from fastpref.report.page import write_report

from . import checkpoint, guard, ranks, sharding
from .batch_order import BatchOrder
from .checkpoint import State
from .config import TrainConfig
from .display import StepBar, samples_line
from .evaluate import evaluate, exact_match, generate
from .fresh_samples import FreshSamples
from .kl_budget import over_budget
from .machine import device_name, peak_memory_mib
from .mfu import model_flops, peak_flops
from .micro_batches import baseline, collated, loss_inputs, totals_of
from .model import Policy, exchanged, fingerprint, pad_token, weights_of
from .optim import Updater, learning_rate
from .pair_metrics import MetricSums, StartLogps, metrics_of_pairs, take_correlation, to_sums
from .reference import ReferenceLogps
from .reference_cache import cached_logps, cached_splits
from .run import Interrupted, Run, save_checkpoint, spent
from .run_folder import reference_again, reference_at_start
from .source import goes_on_with_adapter
from .stage_data import StageData

MOST_SAMPLES = 12  # generations that the summary keeps, before and after


@dataclass(frozen=True)
class Answers:
    """A policy's greedy answers to a stage's questions."""

    exact_match: dict[str, float]  # of all, and of each task
    texts: list[str]  # the first few


@dataclass(frozen=True)
class StageInput:
    """What a stage begins with, beside the policy, whose weights are those it finds."""

    index: int  # its place in the configuration
    config: TrainConfig
    data: StageData
    state: State = field(default_factory=State)  # where it begins: never changed, the stage has a copy
    resumed: Path | None = None  # the checkpoint that `state` is of
    answers: Answers | None = None  # of the policy at step 0, where they are known
    # Of a run that is one of several (fastpref/rounds)
    reference: dict[str, torch.Tensor] | None = None  # weights that the loss compares with; None: as configured
    compared: dict[str, torch.Tensor] | None = None  # weights that fresh samples are compared with; None: the same
    optimizer: dict[str, Any] | None = None  # states that the optimiser begins with
    part: tuple[int, int] = (0, 1)  # (i, n): its learning rates are part i of n of one schedule


@dataclass(frozen=True)
class StageResult:
    state: State  # where the stage has ended
    optimizer: torch.optim.Optimizer  # with its states there


def run_stage(run: Run, given: StageInput) -> StageResult:
    """Trains the run's policy through one stage, from `given.state` on.

    Raises Interrupted after a signal, once a checkpoint is saved, and TrainingError where loss or gradients stay NaN.
    """
    stage, config = Stage(run, given), given.config
    state, steps = stage.state, stage.order.steps
    try:
        stage.begin()
        with run.display.steps(stage.name, state.step, steps) as bar:
            while True:
                stage.watch()
                if state.step == stage.end:
                    break
                run.stop.check()
                run.saver.check()
                stage.step()
                if state.step % config.logging_steps == 0 or state.step == steps:
                    stage.log(bar)
                bar.advance(state.step)
                if config.save_steps and state.step % config.save_steps == 0 and state.step < steps:
                    stage.save()
            if state.window:  # the KL budget has ended the stage between two lines
                stage.log(bar)
    except Interrupted:
        raise Interrupted(stage.leave()) from None
    finally:
        stage.updater.close()
    return stage.result()


class Stage:
    """A stage under way. Its own are `state`, optimiser and data order; the policy and the folder are the run's."""

    def __init__(self, run: Run, given: StageInput) -> None:
        self.run, self.given, self.config, self.name = run, given, given.config, given.config.name or ""
        self.policy, self.pad, self.loss = run.policy, pad_token(run.tokenizer), given.config.loss_fn
        self.examples, self.held_out = given.data.train, given.data.eval
        self.train_ref: ReferenceLogps | None = None
        self.eval_ref: ReferenceLogps | None = None
        self.fresh: FreshSamples | None = None
        self.order = BatchOrder(self.config, self.examples, run.config.seed + given.index)
        self.state = copy.deepcopy(given.state)
        self.state.data = identity_of(self.examples)
        self.history: dict[str, Any] = self.state.history.setdefault(self.name, {})
        if leaked := given.data.leaked:
            self.history["leaked"] = leaked
        budget = self.history.get("kl_budget", {})
        self.end: int = budget["step"] if budget.get("action") == "stop" else self.order.steps  # its last step
        self.start = StartLogps(self.held_out)
        self.report_due = 0.0
        self.flops = model_flops(self.policy)
        scaled = self.policy.compute_dtype == torch.float16
        self.updater = Updater(self.policy.trainable(), self.config, scaled=scaled)
        self.policy.model.train()
        if given.optimizer and not self.state.step:
            sharding.set_states(self.policy, self.updater.optimizer, given.optimizer)
        if given.resumed:
            tensors = checkpoint.read_tensors(given.resumed)
            if self.state.step:
                sharding.load_optimizer(given.resumed, self.policy, self.updater.optimizer, tensors["optimizer"])
            checkpoint.restore_random_state(tensors["random"])
            self.start.restore(tensors)

    def begin(self) -> None:
        """Reference log-probs, and what fresh samples are compared with."""
        config, data, state = self.config, self.given.data, self.state
        if self.loss.needs_reference:
            self.train_ref, self.eval_ref = self._reference_logps()
            self.examples = self.train_ref.attach(data.train)
            if self.eval_ref:
                self.held_out = self.eval_ref.attach(data.eval)
        elif state.step == 0:  # what an implicit reward compares with
            state.reference = fingerprint(self.policy.model)
        self.history["reference"] = state.reference
        generators = checkpoint.random_state()
        at_start = not (state.step or config.ref_model_name_or_path or self.given.reference)
        if self.train_ref and config.check_reference and at_start:
            said = guard.check(self.policy, config, self.examples, self.order.some(4), self.pad)
            if self.run.alone:
                self.run.display.say(f"{self.name}: {said}")
        if config.sample_steps:
            scorer = self.run.scorers.get(config.scorer or "")
            self.fresh = FreshSamples(config, self.run.tokenizer, data.prompts, self._compared(), scorer)
        checkpoint.restore_random_state(generators)

    def watch(self) -> None:
        """Samples and evaluates, if due. Where the KL budget is reached: its checkpoint."""
        state, config = self.state, self.config
        if self.fresh and self.fresh.is_due(state, last=state.step == self.end):
            self._sample(self.fresh)
        due = state.step in (0, self.end) or (config.eval_steps is not None and state.step % config.eval_steps == 0)
        if self.held_out and state.evaluated != state.step and due:
            self._evaluate()
        if self.history.get("kl_budget", {}).get("step") == state.step:
            self.save()

    def step(self) -> None:
        started = time.perf_counter()
        first, micro_batches = self.order.of_step(self.state.step)
        batches = collated(self.examples, micro_batches, self.pad, self.config.kind, self.policy.layout)
        kl = []
        if self.loss.needs_kl and self.train_ref:
            kl = [self.train_ref.of_batch(first + i) for i in range(len(batches))]
        values = train_step(self.policy, self.updater, self.config, batches, self._rate(self.state.step), kl)
        seconds = time.perf_counter() - started
        self.run.seconds["training"] = self.run.seconds.get("training", 0.0) + seconds
        _count(self.state, values, batches, seconds, self.flops.of(batches) if self.flops else math.nan)
        if self.state.skipped_in_a_row >= self.config.max_skipped_steps:
            self.report_due = 0.0
            self._report()
            raise TrainingError(self._why_stopped())

    def _rate(self, step: int) -> float:
        part, parts = self.given.part
        return learning_rate(self.config, part * self.order.steps + step, parts * self.order.steps)

    def _why_stopped(self) -> str:
        self.run.saver.wait()
        saved = checkpoint.checkpoints(self.run.dir)
        return (f"{self.name} step {self.state.step}: loss or gradients were NaN or inf {self.state.skipped_in_a_row} "
                "steps in a row; "
                + (f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"))

    def log(self, bar: StepBar) -> None:
        """Means over the steps since the last line."""
        state, policy = self.state, self.policy
        seconds, flops = state.window.pop("seconds")[0], state.window.pop("flops", (0.0, 0))[0]
        tokens, scored, saved = (state.window.pop(name)[0] for name in ("tokens", "scored_tokens", "saved_tokens"))
        totals = {key: total for key, (total, _) in state.window.items()}
        values = take_correlation(totals)
        values = {key: total / state.window[key][1] for key, total in totals.items()} | values
        values |= {
            "learning_rate": self._rate(state.step - 1),
            "num_tokens": state.num_tokens,
            "tokens_per_s": tokens / seconds,
            "scored_tokens_per_s": scored / seconds,
            "peak_memory_mib": peak_memory_mib(policy.device),
        }
        if policy.layout == "shared":
            values["saved_tokens_per_s"] = saved / seconds
        peak = peak_flops(device_name(policy.device), policy.compute_dtype)
        if flops and peak:
            values["mfu"] = flops / seconds / peak / ranks.size()
        if state.skipped:
            values["skipped_steps"] = state.skipped
        state.window = {}
        self._write("train", values)
        bar.logged(state.step, values)
        self._check_budget("train", values.get("watch/kl"))

    def _write(self, split: str, values: dict[str, float]) -> None:
        step = self.state.step
        self.run.log.write(self.name, split, step, self.order.epoch(step), values, self.state.global_step)

    def save(self) -> Path:
        return save_checkpoint(self.run, self.config, self.state, self.updater.optimizer, self.start.tensors())

    def leave(self) -> str:
        """Saves what there is before the stage has come to its end; where that was."""
        where = f"{self.name} step {self.state.step}/{self.order.steps}"
        if self.state.step or self.given.index:
            where += f", saved in {self.save()}; --resume goes on from there"
            self.run.saver.wait()
        return where

    def result(self) -> StageResult:
        state = self.state
        self.history |= {"steps": state.step, "num_tokens": state.num_tokens, "seconds": state.seconds,
                         "skipped_steps": state.skipped}
        return StageResult(state, self.updater.optimizer)

    # ---- reference ---------------------------------------------------------------------------------------------------

    def _reference_logps(self) -> tuple[ReferenceLogps, ReferenceLogps | None]:
        """Of the stage's examples and of the held-out ones: from the run's files where they fit, else computed and
        written.

        The reference is `ref_model_name_or_path`, or the weights that the stage was given for it, or the policy as it
        found it. Leaves the random generators alone.
        """
        run, config, state, own = self.run, self.config, self.state, self.given.reference
        generators = checkpoint.random_state()
        source: Policy | None = None

        def the_reference() -> Policy:
            nonlocal source
            source = source or self._starting_policy()
            return source

        with spent(run.seconds, "reference"), exchanged(self.policy, own) if own else nullcontext():
            if state.step == 0 or own:
                source = reference_at_start(config, run.tokenizer, self.policy)
                state.reference = fingerprint(source.model)
            found = {
                split.name: cached_logps(
                    split, run.tokenizer, state.reference or "", self.policy, the_reference, run.display, run.stop.tick,
                    replace=run.goes_on or config.overwrite_output_dir,
                )
                for split in cached_splits(run.config, run.dir, self.given.index, config, self.given.data, self.order)
            }
            source = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            checkpoint.restore_random_state(generators)
        return found["train"], found.get("eval")

    def _starting_policy(self) -> Policy:
        """The reference of a stage that has moved on since, made again because its cached log-probs are gone."""
        run = self.run
        return reference_again(run.config, self.given.index, run.dir, run.tokenizer, self.state.reference)

    def _compared(self) -> Callable[[], AbstractContextManager[Policy]]:
        """The reference of fresh samples. A new adapter's is the model without it, and costs nothing; a model of its
        own (ref_model_name_or_path) stays on the device while the stage lasts; else the stage's first weights wait in
        host memory (LoRA's: the adapter's), and change places with the policy's."""
        run, policy, begun = self.run, self.policy, self.state.step > 0
        weights = self.given.reference or self.given.compared
        if self.config.ref_model_name_or_path:
            source = self._starting_policy() if begun else reference_at_start(self.config, run.tokenizer, policy)
            return lambda: nullcontext(source)
        if weights is None and run.config.use_peft and self.given.index == 0 and not goes_on_with_adapter(run.config):
            return lambda: _without_adapter(policy)
        if weights is None:
            weights = checkpoint.snapshot(weights_of(self._starting_policy() if begun else policy))
        return lambda: _with_weights(policy, weights)

    # ---- the watch ---------------------------------------------------------------------------------------------------

    def _sample(self, fresh: FreshSamples) -> None:
        """KL and reward of fresh samples, into a line of metrics; unless they take too long, and wait."""
        run, state, history = self.run, self.state, self.history
        seed = (run.config.seed << 32) + (self.given.index << 24) + state.step
        with spent(run.seconds, "watch"), run.display.counting(f"{self.name}: sampling") as show:
            values = fresh.measure(self.policy, state, seed, run.stop.tick(show))
        record = history.setdefault("sampling", {"taken": 0})
        record["seconds"] = state.sampling["seconds"]
        if values is None:
            if not record.get("waited"):
                takes = f"they take about {state.sampling['expected']:.1f} s"
                run.display.say(f"{self.name} {state.step} fresh samples wait: {takes}, more than sample_time_share="
                                f"{self.config.sample_time_share:g} leaves yet", "cyan")
            record["waited"] = record.get("waited", 0) + 1
            return
        record["taken"] += 1
        if values.get("reward", -math.inf) > history.get("best", {}).get("reward", -math.inf):
            history["best"] = {"step": state.step, "checkpoint": self._folder_name()} | {
                key: values[key] for key in ("reward", "reward_error", "kl") if key in values
            }
        self._write("sample", values)
        run.log.samples(self.name, state.step, fresh.shown)
        self._report()
        run.display.say(f"{self.name} {state.step}/{self.order.steps} fresh samples | {samples_line(values)}", "cyan")
        self._check_budget("sample", values["kl"])

    def _folder_name(self) -> str:
        return checkpoint.folder_name(self.given.index, self.name, self.state.step)

    def _check_budget(self, split: str, kl: float | None) -> None:
        """Takes down where the stage's KL budget is first reached; the checkpoint follows before the next step."""
        state = self.state
        found = over_budget(self.config, state, split, kl, bool(self.given.data.eval), self._folder_name())
        if found and "kl_budget" not in self.history:
            self.history["kl_budget"] = found
            then = "the stage goes on"
            if found["action"] == "stop":
                self.end, then = state.step, "the stage ends here"
            self.run.display.say(f"{self.name} {state.step} KL budget of {found['budget']:g} nats reached: "
                                 f"{found['kl']:.3g} ({found['of']}); checkpoint {found['checkpoint']} is kept, {then}",
                                 "yellow")

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        config, state = self.config, self.state
        with spent(self.run.seconds, "evaluation"):
            with self.run.display.counting(f"{self.name}: evaluating") as show:
                tick = self.run.stop.tick(show)
                if state.step == 0:
                    self.start = StartLogps(self.held_out)
                start = self.start if state.step == 0 or self.start.known else None
                values = evaluate(self.policy, self.held_out, config.kind, self.loss, config.per_device_eval_batch_size,
                                  self.pad, self.eval_ref, tick, start)
            self._check_budget("eval", values.get("watch/kl"))
            last = state.step == self.end
            if config.eval_generate and (last or state.step == 0):
                values |= self._exact_match()
            if state.step == 0:
                self.history["before"], self.history["generated"] = values, state.generated
            if last:
                self.history["after"] = values
            state.evaluated = state.step
            self._write("eval", values)
            self._report()
            if state.step == 0 and not config.ref_model_name_or_path:  # its own reference: nothing to tell
                trivial = ("kl", "rewards/", "watch/kl", "watch/chosen")
                values = {key: value for key, value in values.items() if not key.startswith(trivial)}
            place = f"{self.name} {state.step}/{self.order.steps}"
            self.run.display.values(f"{place} held-out", values, "cyan")

    def _report(self) -> None:
        """report.html as the run stands; of one that takes a second or more to write, for a twentieth of the time."""
        started = time.perf_counter()
        if ranks.is_first() and started >= self.report_due:
            write_report(self.run.dir)
            took = time.perf_counter() - started
            self.report_due = started + 20 * took if took > 1 else 0.0

    def _exact_match(self) -> dict[str, float]:
        run, state, questions, known = self.run, self.state, self.given.data.questions, self.given.answers
        if state.step == 0 and known:
            state.generated = known.texts
            return known.exact_match
        with run.display.counting(f"{self.name}: generating") as show:
            texts = generate(
                self.policy, run.tokenizer, [question.prompt_ids for question in questions],
                self.config.per_device_eval_batch_size, self.config.eval_max_new_tokens, run.stop.tick(show),
            )
        state.generated = texts[:MOST_SAMPLES]
        return exact_match(questions, texts)


@contextmanager
def _without_adapter(policy: Policy) -> Iterator[Policy]:
    with policy.model.disable_adapter():
        yield policy


@contextmanager
def _with_weights(policy: Policy, weights: dict[str, torch.Tensor]) -> Iterator[Policy]:
    with exchanged(policy, weights):
        yield policy


# ---- one step --------------------------------------------------------------------------------------------------------


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
        inputs = loss_inputs(loss, batch, kl_logps, ref_kl)
        out = policy.compute_loss(batch, loss, totals, updater.scale, **inputs)
        value = out.loss if counts else 0 * out.loss
        if not updater.in_backward or math.isfinite(value.item()):
            value.backward()
        total += value.detach() / updater.scale
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
