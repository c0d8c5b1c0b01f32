"""Token-level policy gradient with clipped ratios (PPO, GRPO and their relatives), on the token log-probs of
`linear_logps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .base import check, check_number
from .late import torch
from .sequences import Number, _at_least_one

if TYPE_CHECKING:
    from torch import Tensor

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class PolicyGradient:
    """Clipped policy gradient (PPO, arXiv 1707.06347 eq. 7) with GRPO's penalty (arXiv 2402.03300 eq. 3-4). Per token t

        l_t = -min(rho_t A, clip(rho_t, 1 - epsilon_low, 1 + epsilon_high) A) + beta k3_t,
        rho_t = pi(t) / pi_old(t),        k3_t = pi_ref(t) / pi(t) - 1 - log(pi_ref(t) / pi(t)),

    A the advantage of the sequence (or of the token), without gradient. k3 estimates KL(pi || pi_ref) without bias and
    is never negative (J. Schulman, "Approximating KL divergence"). `loss_type`, under TRL's names, says how the l_t of
    the tokens that the mask admits become a loss, and the call which counts it divides by:

        grpo     sum over sequences of (mean over a sequence's tokens of l_t) / sequences       arXiv 2402.03300
        bnpo     sum of l_t / tokens of this call
        dr_grpo  sum of l_t / (sequences * max_completion_length)                               arXiv 2503.20783
        dapo     sum of l_t / tokens of the global batch                                        arXiv 2503.14476

    `sequences` and `tokens` are those of the global batch where this call is a part of it; all but bnpo then add up.

    importance_sampling_level="sequence" (GSPO, arXiv 2507.18071): one ratio a sequence, exp of the mean over its tokens
    of log rho_t. delta: an upper bound on rho itself (two-sided clipping, arXiv 2505.07291), above 1 + epsilon_high.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        check(self.loss_type in AGGREGATIONS, "loss_type", self.loss_type, ", ".join(map(repr, AGGREGATIONS)))
        check_number("epsilon_low", self.epsilon_low, least=0)
        check_number("epsilon_high", self.epsilon_high, least=0)
        check_number("beta", self.beta, least=0)
        if self.delta is not None:
            check_number("delta", self.delta, above=1 + self.epsilon_high)
        level = self.importance_sampling_level
        check(level in ("token", "sequence"), "importance_sampling_level", level, "'token' or 'sequence'")
        fixed = self.loss_type == "dr_grpo"
        if fixed or self.max_completion_length is not None:
            takes = "a number of tokens above 0" if fixed else f"None with loss_type {self.loss_type!r}"
            ok = fixed and isinstance(self.max_completion_length, int) and self.max_completion_length > 0
            check(ok, "max_completion_length", self.max_completion_length, takes)

    def __call__(
        self,
        logps: Tensor,
        mask: Tensor,
        advantages: Tensor,
        *,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        sequences: Number | None = None,
        tokens: Number | None = None,
    ) -> Tensor:
        """
        Args:
            logps: [S, T] token log-probs, nats, differentiable (`linear_logps`).
            mask: bool [S, T], the tokens that count; what others hold does not matter.
            advantages: [S], or [S, T].
            old_logps: [S, T] under the policy that sampled; None: this one (ratios of 1, with their gradient).
            ref_logps: [S, T] under the reference, if beta is above 0.
            sequences: what grpo and dr_grpo divide by; None: S.
            tokens: what dapo divides by; None: the tokens of this call.

        Returns:
            A scalar, differentiable with respect to logps.
        """
        check(logps.dim() == 2, "logps", tuple(logps.shape), "[S, T]")
        check(mask.dtype == torch.bool, "mask", mask.dtype, "bool")
        for name, x in (("mask", mask), ("old_logps", old_logps), ("ref_logps", ref_logps)):
            if x is not None:
                check(x.shape == logps.shape, name, tuple(x.shape), f"{tuple(logps.shape)}, the shape of logps")
        shapes = (logps.shape[:1], logps.shape)
        check(advantages.shape in shapes, "advantages", tuple(advantages.shape), f"{shapes[0]} or {shapes[1]}")
        needs = "None with beta 0" if self.beta == 0 else "[S, T] with beta above 0"
        check((ref_logps is None) == (self.beta == 0), "ref_logps", ref_logps if ref_logps is None else "given", needs)
        counts = {"grpo": "sequences", "dr_grpo": "sequences", "dapo": "tokens"}
        for name, count in (("sequences", sequences), ("tokens", tokens)):
            ok = count is None or counts.get(self.loss_type) == name
            check(ok, name, count, f"None: {self.loss_type} does not divide by it")

        advantages = advantages.detach()
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        lengths = mask.sum(1)
        log_ratio = _where(mask, logps - (logps if old_logps is None else old_logps).detach())
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio.sum(1) / lengths.clamp(min=1))[:, None]
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        ratio = ratio if self.delta is None else ratio.clamp(max=self.delta)
        per_token = -torch.minimum(ratio * advantages, clipped * advantages)
        if ref_logps is not None:
            log_ref = _where(mask, ref_logps.detach() - logps)
            per_token = per_token + self.beta * (torch.expm1(log_ref) - log_ref)
        per_token = _where(mask, per_token.expand_as(logps))

        if self.loss_type in ("bnpo", "dapo"):
            return per_token.sum() / _at_least_one(mask.sum() if tokens is None else tokens)
        sequences = max(logps.shape[0], 1) if sequences is None else sequences
        if self.loss_type == "grpo":
            return (per_token.sum(1) / lengths.clamp(min=1)).sum() / sequences
        assert self.max_completion_length is not None
        return per_token.sum() / (sequences * self.max_completion_length)


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """0 where masked out: whatever stands there, NaN included, has no part in the gradient."""
    return torch.where(mask, x, torch.zeros_like(x))
