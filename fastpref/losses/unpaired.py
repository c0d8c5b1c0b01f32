"""Losses on single sequences with a `desirable` flag each, against a reference: KTO and its relatives.

r = logp - ref_logp, log-probs summed over tokens; s the logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Coupling, Loss, check_number, register
from .late import F, torch
from .sequences import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Flagged(Loss):
    """Mean over sequences of one term where desirable, of another otherwise, each with its weight."""

    pairwise = False
    needs_desirable = True
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        for name in ("desirable_weight", "undesirable_weight"):
            check_number(name, getattr(self, name), least=0)

    @property
    def coupling(self) -> Coupling:
        return "sequence"

    def terms(self, seq: SequenceLogps, desirable: Tensor) -> tuple[Tensor, Tensor]:
        """What a sequence costs if desirable, and if not; [S] each."""
        raise NotImplementedError

    def __call__(self, seq: SequenceLogps) -> Tensor:
        if seq.desirable is None:
            raise ValueError(f"desirable is None; {self.name} takes a flag for each sequence, bool [S]")
        good, bad = self.terms(seq, seq.desirable)
        return seq.sequence_mean(
            torch.where(seq.desirable, self.desirable_weight * good, self.undesirable_weight * bad)
        )


@register
@dataclass(frozen=True)
class KTO(_Flagged):
    """Kahneman-Tversky optimisation, arXiv 2402.01306 eq. 8, without its constant: mean over sequences of

        desirable_weight   * (1 - s(beta (r - z)))   where desirable,
        undesirable_weight * (1 - s(beta (z - r)))   otherwise,

    z = max(0, mean over the mismatched pairs of logp - ref_logp), without gradient. The mismatched pairs (a response of
    another prompt) come as `kl_logps` and `ref_kl_logps`; for a global batch pass the global ones: the clamp follows
    the mean. No pairs: sequences in any order, each with its `desirable` flag. Adds up over sequences.
    """

    name = "kto"
    formula = "1 - σ(β (r - z)) | 1 - σ(β (z - r))"
    paper = "arXiv 2402.01306"
    needs_kl = True

    def terms(self, seq: SequenceLogps, desirable: Tensor) -> tuple[Tensor, Tensor]:
        if seq.kl is None:
            raise ValueError("kl is None; KTO takes the log-probs of mismatched pairs: kl_logps and ref_kl_logps")
        distance = self.beta * (seq.logratios - seq.kl.detach().clamp(min=0))
        # s(-x) is 1 - s(x) without its cancellation
        return torch.sigmoid(-distance), torch.sigmoid(distance)


@register
@dataclass(frozen=True)
class APOZeroUnpaired(_Flagged):
    """Anchored preference optimisation without pairs, arXiv 2408.06266 eq. 7 (TRL's KTO loss "apo_zero_unpaired"): mean
    over sequences of desirable_weight * (1 - s(beta r)) where desirable, undesirable_weight * s(beta r) otherwise.

    KTO with a baseline of 0: no mismatched pairs. Adds up over sequences.
    """

    name = "apo_zero_unpaired"
    formula = "1 - σ(β r) | σ(β r)"
    paper = "arXiv 2408.06266"

    def terms(self, seq: SequenceLogps, desirable: Tensor) -> tuple[Tensor, Tensor]:
        rewards = self.beta * seq.logratios
        return torch.sigmoid(-rewards), torch.sigmoid(rewards)


@register
@dataclass(frozen=True)
class BCO(_Flagged):
    """Binary classifier optimisation, arXiv 2404.04656: mean over sequences of

        desirable_weight   * -log s(beta r - delta)   where desirable,
        undesirable_weight * -log s(delta - beta r)   otherwise.

    delta, the reward shift (in units of beta r, without gradient): a number, for example a running mean kept by the
    caller, and the loss adds up over sequences; or None, the paper's delta of this very call, half the mean reward of
    its desirable plus half that of its undesirable sequences (the mean of one kind where the other is absent). Then
    each gradient depends on the whole batch and parts of a batch do NOT add up to it.
    """

    name = "bco"
    formula = "-log σ(β r - δ) | -log σ(δ - β r)"
    paper = "arXiv 2404.04656"
    delta: float | None = None

    def check_options(self) -> None:
        super().check_options()
        if self.delta is not None:
            check_number("delta", self.delta)

    @property
    def coupling(self) -> Coupling:
        return "batch" if self.delta is None else "sequence"

    def terms(self, seq: SequenceLogps, desirable: Tensor) -> tuple[Tensor, Tensor]:
        rewards = self.beta * seq.logratios
        shifted = rewards - (_mean_reward(rewards.detach(), desirable) if self.delta is None else self.delta)
        return -F.logsigmoid(shifted), -F.logsigmoid(-shifted)


def _mean_reward(rewards: Tensor, desirable: Tensor) -> Tensor:
    """The mean of the two kinds' means, of those there are."""
    total, kinds = rewards.new_zeros(()), rewards.new_zeros(())
    for of_kind in (desirable, ~desirable):
        count = of_kind.sum()
        total = total + torch.where(of_kind, rewards, 0).sum() / count.clamp(min=1)
        kinds = kinds + (count > 0)
    return total / kinds.clamp(min=1)
