"""KL and reward of responses that the policy samples now (`sample_steps`): the part of the watch on over-optimisation
that takes time of its own. docs/watch.md has every metric, its formula, and what to do about it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, collate, eval_order
from fastpref.errors import UserError

from . import ranks
from .checkpoint import State, random_state, restore_random_state
from .config import TrainConfig
from .display import Tick
from .model import Policy, pad_token
from .prompts import TokenizedPrompt
from .sample import Sampling, sample
from .scorer import Scorer

SHOWN = 6  # responses of a sampling that are kept
CLOSE = 0.25  # nats a token, up to which k3 is the better estimator of the two


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
    ratios = [(ref - own).cpu().double() for own, ref in zip(logps, ref_logps, strict=True)]
    for name, values in (("kl_k1", [-x.sum() for x in ratios]), ("kl_k3", [(x.expm1() - x).sum() for x in ratios])):
        found |= mean_and_error(name, torch.stack(values))
    tokens = sum(len(x) for x in ratios) / len(ratios)
    better = "kl_k3" if found["kl_k1"] <= CLOSE * tokens else "kl_k1"
    return {name.replace(better, "kl"): value for name, value in found.items() if name.startswith(better)} | found


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """values [n]: their mean, and from n = 2 on its standard error as NAME_error."""
    values = values.cpu().double()
    found = {name: float(values.mean())}
    if len(values) > 1:
        found[f"{name}_error"] = float(values.std() / math.sqrt(len(values)))
    return found


class OutOfTime(Exception):
    """A sampling that would take more than its share of the time."""


@dataclass
class FreshSamples:
    """Samples from the policy, and measures: KL to the reference, reward."""

    stage: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[TokenizedPrompt]
    reference: Callable[[], AbstractContextManager[Policy]]  # within it, a policy with the reference's weights
    scorer: Scorer | None
    shown: list[dict[str, Any]] = field(default_factory=list)  # the first of the last samples, for people

    def is_due(self, state: State, last: bool) -> bool:
        """Whether a multiple of sample_steps has come since the last sampling (a stage's end, its start where time has
        no limit), and there is time: what was spent, and what this one is expected to take, fit in the share."""
        every, share = self.stage.sample_steps or 1, self.stage.sample_time_share
        before = state.sampling.get("step", -1 if share is None else 0)
        if not (state.step // every > before // every or (last and before < state.step)):
            return False
        left = self._left(state)
        return ranks.on_first(lambda: left > 0 and left >= state.sampling.get("expected", 0.0))

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
            if done and ranks.on_first(lambda: (time.perf_counter() - started) / done * of > left):
                state.sampling["expected"] = (time.perf_counter() - started) / done * of
                raise OutOfTime

        try:
            values = self._measure(policy, seed, watch)
            state.sampling["step"] = state.step
            state.sampling["expected"] = time.perf_counter() - started
        except OutOfTime:
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
        prompts = [prompt.prompt for prompt in self.prompts]
        texts = [sampled.after(prompt) for prompt, sampled in zip(prompts, samples, strict=True)]
        self.shown = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts[:SHOWN], texts)]
        if self.scorer is not None:
            scores = ranks.on_first(partial(self.scorer.score, prompts, texts))
            there = [score for score in scores if score is not None]
            if there:
                values |= mean_and_error("reward", torch.tensor(there, dtype=torch.float64))
            values["not_scored"] = len(scores) - len(there)
            self.shown = [one | {"reward": score} for one, score in zip(self.shown, scores)]
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
    for indices, counts in ranks.share(eval_order(examples, batch_size)):
        batch = collate([examples[i] for i in indices], pad, "sft", layout=policy.layout)
        logps = policy.token_logps(batch.to(policy.device)).cpu()
        lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]
        found |= dict(zip(indices, logps.split(lengths))) if counts else {}
    policy.model.train(was_training)
    found = {i: logps for part in ranks.told(found) for i, logps in part.items()}
    return [found[i] for i in range(len(examples))]


def check_prompts(stage: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase,
                  prompts: Sequence[TokenizedPrompt]) -> None:
    """Raises UserError for prompts that the policy cannot continue: before a stage, not at its first sampling."""
    try:
        sample(policy, tokenizer, [p.ids for p in prompts], Sampling(max_new_tokens=stage.sample_max_new_tokens))
    except UserError as error:
        raise UserError(f"sample_steps: {error}") from None
