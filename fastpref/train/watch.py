"""The watch on over-optimisation: what tells, while a run goes on, that it has gone too far.

Always on, per pair, from numbers that the step has anyway (`watched`): log-probs against their start, the KL on the
data's responses, the correlation of margin and length. If asked, every `sample_steps` (`Fresh`): KL and reward of
responses that the policy samples now. docs/watch.md has every metric, its formula, and what to do about it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.data import Batch, Example, Kind, Record, collate, eval_order
from fastpref.errors import UserError

from . import ranks
from .checkpoint import State, random_state, restore_random_state
from .config import TrainConfig
from .model import Policy, pad_token
from .reference import Tick, identity
from .sample import Sampling, sample

if TYPE_CHECKING:  # the scorers read runs, which have a watch
    from .scorer import Prompt, Scorer

FELL = 0.01  # nats by which a log-prob must be lower to have fallen: rounding is no fall
FLAT = 1e-4  # standard deviation of margins below which there is rounding to correlate, and nothing else
CLOSE = 0.25  # nats a token, up to which k3 is the better estimator of the two
MOMENT = "moment/"  # before the names of the sums that a correlation is made of

# ---- per pair --------------------------------------------------------------------------------------------------------


def watched(kind: Kind, out: Any, batch: Batch, start: Tensor | None) -> dict[str, Tensor]:
    """What is watched of one batch, one value a pair (KTO: a sequence, NaN where it is of the other kind), on the
    device and without waiting for it. out: what `Policy.score` returned; start [S]: log-probs to compare with.
    """
    found: dict[str, Tensor] = {}
    if out.logps is not None and kind != "sft":
        if start is not None:
            found |= changes(out.logps - start, batch.desirable)
        if batch.ref_logps is not None and "kl" not in out.metrics:
            found["kl"] = spread_kl(out.logps, batch.ref_logps, out.lengths)
    if kind == "pair":
        found |= moments(_margins(out.metrics), _length_gaps(batch))
    return found


def changes(change: Tensor, desirable: Tensor | None) -> dict[str, Tensor]:
    """change [S]: log-prob minus its start, nats. desirable [S]: KTO's; None: pairs, first half chosen."""
    if desirable is None:
        chosen, rejected = change.chunk(2)
    else:
        chosen, rejected = change.where(desirable, math.nan), change.where(~desirable, math.nan)
    fell = (chosen < -FELL).float().where(~chosen.isnan(), math.nan)
    return {"watch/chosen_change": chosen, "watch/rejected_change": rejected, "watch/chosen_fell": fell}


def spread_kl(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
    """|y| (exp(rho) - 1 - rho), rho = (log pi(y|x) - log pi_ref(y|x)) / |y|; [S] each, nats a response, at least 0.

    The k3 estimator (J. Schulman, "Approximating KL divergence") of KL(pi_ref || pi), with the log-ratio of a response
    spread evenly over its tokens. It estimates that in so far as the responses are like the reference's own.
    """
    tokens = lengths.clamp(min=1)
    rho = (logps - ref_logps) / tokens
    return tokens * (torch.expm1(rho) - rho)


def _margins(metrics: dict[str, Tensor]) -> Tensor:
    """[P]: of implicit rewards, of a reward model's, or of log-probs where a loss has no rewards."""
    for name in ("rewards/margins", "margin"):
        if name in metrics:
            return metrics[name]
    return metrics["logps/chosen"] - metrics["logps/rejected"]


def _length_gaps(batch: Batch) -> Tensor:
    """[P] fp64: |y_chosen| - |y_rejected|, scored tokens."""
    lengths = torch.tensor(batch.cu_seqlens, dtype=torch.float64).diff()
    chosen, rejected = lengths.chunk(2)
    gaps = chosen - rejected
    device = batch.input_ids.device
    return gaps.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else gaps


def moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Whose sums over any number of batches, ranks and steps give the correlation of all x and y."""
    x, y = x.double(), y.double()
    return {f"{MOMENT}{name}": value for name, value in
            (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y))}


def to_sums(values: dict[str, float], pairs: float) -> None:
    """Turns the means of `moments` over a batch of `pairs` pairs into sums, in place, and adds the count."""
    for name in [name for name in values if name.startswith(MOMENT)]:
        values[name] *= pairs
        values[f"{MOMENT}n"] = pairs


def take_correlation(sums: dict[str, float]) -> dict[str, float]:
    """Pearson's, of the sums of `moments`, which it removes: {"watch/length_correlation": r}, or nothing where the
    margins or the lengths do not vary."""
    own = {name: sums.pop(name) for name in [name for name in sums if name.startswith(MOMENT)]}
    if not own or not own[f"{MOMENT}n"]:
        return {}
    n, x, y, xx, yy, xy = (own[MOMENT + name] for name in ("n", "x", "y", "xx", "yy", "xy"))
    of_x, of_y = max(xx / n - (x / n) ** 2, 0.0), max(yy / n - (y / n) ** 2, 0.0)
    if not (of_x > FLAT**2 and of_y > 1e-9):
        return {}
    return {"watch/length_correlation": (xy / n - x / n * y / n) / math.sqrt(of_x * of_y)}


class Start:
    """Log-probs of the held-out responses as a stage begins, which its first evaluation leaves here."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.data = identity(examples)
        responses = len(examples[0].responses) if examples else 0
        self.logps = torch.zeros(len(examples), responses)
        self.known = False  # before the first evaluation, and of other data than it was on

    def of(self, indices: Sequence[int], logps: Tensor, counts: bool) -> Tensor | None:
        """[S] of a batch of these examples, whose log-probs are now `logps`. counts: see `ranks.share`."""
        if self.known:
            return self.logps[list(indices)].t().reshape(-1).to(logps.device, non_blocking=True)
        if counts:
            self.logps[list(indices)] = logps.view(-1, len(indices)).t().float().cpu()
        return logps

    def complete(self) -> None:
        """After an evaluation, on all ranks."""
        if not self.known:
            self.logps, self.known = ranks.total(self.logps), True

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"start": {"data": self.data, "logps": self.logps}} if self.known else {}

    def restore(self, tensors: dict[str, Any]) -> None:
        saved = tensors.get("start")
        if saved and saved["data"] == self.data:
            self.logps, self.known = saved["logps"], True


# ---- the KL budget ---------------------------------------------------------------------------------------------------

SOURCES = {"sample": "fresh samples", "eval": "held-out responses", "train": "training responses"}


def budget_source(stage: TrainConfig, held_out: bool) -> str:
    """Which KL `kl_budget` is compared with, as a split of metrics.jsonl: the best there is."""
    if stage.sample_steps:
        return "sample"
    return "eval" if held_out and stage.eval_steps else "train"


def over_budget(stage: TrainConfig, state: State, split: str, kl: float | None, held_out: bool,
                checkpoint: str) -> dict[str, Any] | None:
    """The record of a budget that this measurement reaches, the first to do so; else None."""
    wanted = stage.kl_budget is not None and stage.loss_fn.needs_reference and state.step > 0
    if not wanted or split != budget_source(stage, held_out) or kl is None or not kl >= (stage.kl_budget or 0):
        return None
    return {"budget": stage.kl_budget, "kl": kl, "of": SOURCES[split], "step": state.step,
            "action": stage.kl_budget_action, "checkpoint": checkpoint}


# ---- fresh samples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreshPrompt:
    """What is sampled from."""

    prompt: Prompt  # as the record has it, for the scorer
    ids: list[int]


def fresh_prompts(records: Sequence[Record], examples: Sequence[Example], limit: int) -> list[FreshPrompt]:
    """The first so many different ones."""
    found: dict[tuple[int, ...], FreshPrompt] = {}
    for example in examples:
        if len(found) == limit:
            break
        prompt = records[example.record_id].prompt
        found.setdefault(tuple(example.prompt_ids), FreshPrompt(prompt, example.prompt_ids))
    return list(found.values())


def decoded_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int
) -> list[FreshPrompt]:
    """The same of examples whose records are not at hand."""
    different = dict.fromkeys(tuple(example.prompt_ids) for example in examples)
    return [
        FreshPrompt(str(tokenizer.decode(list(ids), skip_special_tokens=True)), list(ids))
        for ids in list(different)[:limit]
    ]


def kl_estimates(logps: Sequence[Tensor], ref_logps: Sequence[Tensor]) -> dict[str, float]:
    """KL(pi || pi_ref), nats a response, from token log-probs of responses that pi itself has sampled; [|y|] each.

        k1 = sum_t log pi(y_t) - log pi_ref(y_t)        k3 = sum_t r_t - 1 - log r_t,    r_t = pi_ref(y_t) / pi(y_t)

    (J. Schulman, "Approximating KL divergence".) Both are unbiased: given what stands before it, a token of pi has
    E[r_t] = 1. k3 has no negative terms, and far less variance where the two policies are close; far apart its r_t has
    a heavy tail, which few samples show. Also their standard errors over responses, of two or more.

    `kl`, for whoever wants one number: k3 up to k1 = 0.25 nats a token, k1 beyond. (Were log r_t Gaussian, k3 would
    have the lower variance up to 0.63.)
    """
    found: dict[str, float] = {}
    ratios = [(ref - own).double() for own, ref in zip(logps, ref_logps, strict=True)]
    for name, values in (("kl_k1", [-x.sum() for x in ratios]), ("kl_k3", [(x.expm1() - x).sum() for x in ratios])):
        found |= mean_and_error(name, torch.stack(values))
    tokens = sum(len(x) for x in ratios) / len(ratios)
    better = "kl_k3" if found["kl_k1"] <= CLOSE * tokens else "kl_k1"
    return {name.replace(better, "kl"): value for name, value in found.items() if name.startswith(better)} | found


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """values [n]: their mean, and from n = 2 on its standard error as NAME_error."""
    found = {name: float(values.double().mean())}
    if len(values) > 1:
        found[f"{name}_error"] = float(values.double().std() / math.sqrt(len(values)))
    return found


class PutOff(Exception):
    """A sampling that would take more than its share of the time."""


@dataclass
class Fresh:
    """Samples from the policy, and measures: KL to the reference, reward."""

    stage: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[FreshPrompt]
    reference: Callable[[], AbstractContextManager[Policy]]  # within it, a policy with the reference's weights
    scorer: Scorer | None

    def is_due(self, state: State, last: bool) -> bool:
        """Whether a multiple of sample_steps has come since the last sampling (a stage's end, its start where time has
        no limit), and there is time: what was spent, and what this one is expected to take, fit in the share."""
        every, share = self.stage.sample_steps or 1, self.stage.sample_time_share
        before = state.sampling.get("step", -1 if share is None else 0)
        if not (state.step // every > before // every or (last and before < state.step)):
            return False
        left = self._left(state)
        return left > 0 and left >= state.sampling.get("expected", 0.0)

    def _left(self, state: State) -> float:
        """Seconds that may still be spent."""
        share = self.stage.sample_time_share
        return math.inf if share is None else share * state.seconds - state.sampling.get("seconds", 0.0)

    def measure(self, policy: Policy, state: State, seed: int, tick: Tick) -> dict[str, float] | None:
        """The values of a line of metrics, or None where it was broken off: after its first batch, if what is left of
        the time share is less than all batches will take. Leaves the policy and the random generators as they are."""
        started, left, generators = time.perf_counter(), self._left(state), random_state()

        def watch(done: int, of: int) -> None:
            tick(done, of)
            if done and (time.perf_counter() - started) / done * of > left:
                state.sampling["expected"] = (time.perf_counter() - started) / done * of
                raise PutOff

        try:
            values = self._measure(policy, seed, watch)
            state.sampling["step"] = state.step
            state.sampling["expected"] = time.perf_counter() - started
        except PutOff:
            values = None
        finally:
            restore_random_state(generators)
            spent = time.perf_counter() - started
            state.sampling["seconds"] = state.sampling.get("seconds", 0.0) + spent
        if values is None:
            return None
        values["seconds"] = spent
        if state.seconds:
            values["time_share"] = state.sampling["seconds"] / state.seconds
        return values

    def _measure(self, policy: Policy, seed: int, tick: Tick) -> dict[str, float]:
        settings = self.sampling(seed)
        ids = [prompt.ids for prompt in self.prompts]
        drawn = dict(sample(policy, self.tokenizer, ids, settings, tick))
        samples = [drawn[i][0] for i in range(len(ids))]
        examples = [Example(i, ids[i], (sampled.ids,)) for i, sampled in enumerate(samples)]
        size, pad = settings.batch_size, pad_token(self.tokenizer)
        own = response_logps(policy, examples, size, pad)
        with self.reference() as reference:
            theirs = response_logps(reference, examples, size, pad)
        values = kl_estimates(own, theirs) | {
            "samples": len(samples),
            "response_length": sum(len(sampled.ids) for sampled in samples) / len(samples),
            "ended": sum(sampled.ended for sampled in samples) / len(samples),
        }
        if self.scorer is not None:
            scores = self.scorer.score([prompt.prompt for prompt in self.prompts], [s.text for s in samples])
            there = [score for score in scores if score is not None]
            if there:
                values |= mean_and_error("reward", torch.tensor(there, dtype=torch.float64))
            values["not_scored"] = len(scores) - len(there)
        return values

    def sampling(self, seed: int) -> Sampling:
        """Temperature 1 and the whole distribution: with anything else the estimates would be of another KL."""
        return Sampling(max_new_tokens=self.stage.sample_max_new_tokens, seed=seed,
                        batch_size=self.stage.per_device_eval_batch_size)


@torch.no_grad()
def response_logps(policy: Policy, examples: Sequence[Example], batch_size: int, pad: int) -> list[Tensor]:
    """[|y|] of each example's one response, token by token, on the CPU."""
    was_training = policy.model.training
    policy.model.eval()
    found: dict[int, Tensor] = {}
    for indices in eval_order(examples, batch_size):
        batch = collate([examples[i] for i in indices], pad, "sft", layout=policy.layout)
        logps = policy.token_logps(batch.to(policy.device)).cpu()
        lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]
        found |= dict(zip(indices, logps.split(lengths)))
    policy.model.train(was_training)
    return [found[i] for i in range(len(examples))]


def check_prompts(stage: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase,
                  prompts: Sequence[FreshPrompt]) -> None:
    """Raises UserError for prompts that the policy cannot continue: before a stage, not at its first sampling."""
    try:
        sample(policy, tokenizer, [p.ids for p in prompts], Sampling(max_new_tokens=stage.sample_max_new_tokens))
    except UserError as error:
        raise UserError(f"sample_steps: {error}") from None
