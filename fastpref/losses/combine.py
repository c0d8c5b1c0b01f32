"""Losses made of losses: weighted sums, and WPO's weights; and LD-DPO's weights of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Coupling, Loss, check, check_number, register
from .late import torch
from .pairs import DPO, BCOPair
from .reference_free import ChosenSFT
from .sequences import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor

_WIDTH: dict[Coupling, int] = {"sequence": 0, "pair": 1, "batch": 2}


@dataclass(frozen=True)
class _Composite(Loss):
    """Needs what any of its parts needs; couples what the widest of them couples."""

    @property
    def pairwise(self) -> bool:
        return any(part.pairwise for part in self.parts)

    @property
    def coupling(self) -> Coupling:
        return max((part.coupling for part in self.parts), key=lambda coupling: _WIDTH[coupling])

    @property
    def needs_reference(self) -> bool:
        return any(part.needs_reference for part in self.parts)

    @property
    def needs_desirable(self) -> bool:
        return any(part.needs_desirable for part in self.parts)

    @property
    def needs_kl(self) -> bool:
        return any(part.needs_kl for part in self.parts)

    @property
    def needs_extras(self) -> tuple[str, ...]:
        return tuple(sorted({name for part in self.parts for name in part.needs_extras}))

    @property
    def antisymmetric(self) -> bool:
        """All of them, and with equal coefficients: G of a sum is the sum of theirs."""
        equal = len({part.length_averaged for part in self.parts}) == 1
        return equal and all(part.antisymmetric and _usual_coefficients(part) for part in self.parts)

    @property
    def length_averaged(self) -> bool:
        return all(part.length_averaged for part in self.parts)

    @property
    def _rewarding(self) -> Loss:
        """The first part with a beta: its implicit reward is charted."""
        return next((part for part in self.parts if hasattr(part, "beta")), self.parts[0])

    @property
    def reward_scale(self) -> float:
        return self._rewarding.reward_scale

    def rewards(self, seq: SequenceLogps) -> Tensor | None:
        return self._rewarding.rewards(seq)


@register
@dataclass(frozen=True)
class WeightedSum(_Composite):
    """L = sum over i of weights_i * losses_i, each with its own sums and means; weights not normalised (TRL's
    `loss_type` and `loss_weights` as lists). Adds up over pairs or sequences where each of its losses does.

    By default mixed preference optimisation (MPO), arXiv 2411.10442: 0.8 DPO + 0.2 BCO on pairs + 1.0 SFT on chosen.
    Metrics chart the implicit reward of the first loss that has a beta.
    """

    name = "weighted_sum"
    formula = "0.8 dpo + 0.2 bco_pair + chosen_sft, or any other sum"
    paper = "arXiv 2411.10442"
    losses: tuple[Loss, ...] = (DPO(), BCOPair(), ChosenSFT())
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)

    def check_options(self) -> None:
        for name in ("losses", "weights"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise TypeError(f"{name} is {value!r}; it takes a sequence of at least one")
            object.__setattr__(self, name, tuple(value))
        for i, loss in enumerate(self.losses):
            _check_loss(f"losses[{i}]", loss)
        same = len(self.weights) == len(self.losses)
        check(same, "weights", self.weights, f"a number for each of the {len(self.losses)} losses")
        for i, weight in enumerate(self.weights):
            check_number(f"weights[{i}]", weight)

    @property
    def parts(self) -> tuple[Loss, ...]:
        return self.losses

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        terms = [weight * loss.per_pair(seq) for loss, weight in zip(self.losses, self.weights)]
        return torch.stack(terms).sum(0)

    def __call__(self, seq: SequenceLogps) -> Tensor:
        """Loss by loss: not all of them need be means over pairs."""
        return torch.stack([weight * loss(seq) for loss, weight in zip(self.losses, self.weights)]).sum()


@register
@dataclass(frozen=True)
class WPO(_Composite):
    """Weighted preference optimisation, arXiv 2406.11827: the pairs of another loss, weighted by how likely the
    policy is to have sampled their responses; mean over pairs of

        w_chosen w_rejected l(pair),    w = exp( mean over the scored tokens t of log pi(y_t) - log sum_v pi(v)^2 ),

    weights without gradient, 1 for a policy sure of every token. `loss` is any loss that is a mean over pairs (sums of
    such too: TRL weighs an SFT term by the mean weight of the batch instead). The head computes log sum_v pi(v)^2 with
    the logits. Token weights are for l; in w each token counts once. Adds up over pairs.
    """

    name = "wpo"
    formula = "w_c w_r l(pair), w = exp(mean of log π(y) - log sum π²)"
    paper = "arXiv 2406.11827"
    loss: Loss = DPO()

    def check_options(self) -> None:
        _check_loss("loss", self.loss)
        check(_by_pairs(self.loss), "loss", self.loss, "a loss that is a mean over pairs, and couples no others")

    @property
    def parts(self) -> tuple[Loss, ...]:
        return (self.loss,)

    @property
    def needs_extras(self) -> tuple[str, ...]:
        return tuple(sorted({"log_sum_p2", *self.loss.needs_extras}))

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        logps = (seq.logps if seq.unweighted is None else seq.unweighted).detach()
        chosen, rejected = ((logps - seq.extra("log_sum_p2")) * seq.per_length).chunk(2)
        return torch.exp(chosen + rejected) * self.loss.per_pair(seq)


def _check_loss(name: str, loss: object) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(f"{name} is {loss!r}; it takes an object of fastpref.losses")


def _usual_coefficients(loss: Loss) -> bool:
    """Not those of a class of the user's, which two parts need not have in common."""
    return type(loss).coefficients is Loss.coefficients


def _by_pairs(loss: Loss) -> bool:
    """Whether `per_pair` says all there is to it."""
    if isinstance(loss, WeightedSum):
        return all(map(_by_pairs, loss.losses))
    own = type(loss).per_pair is not Loss.per_pair and type(loss).__call__ is Loss.__call__
    return own and loss.pairwise and loss.coupling == "pair"


def tail_weights(mask: Tensor, alpha: float, *, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """Token weights of length-desensitised DPO (LD-DPO), arXiv 2409.06411 (TRL's `ld_alpha`): 1 up to the length
    of the shorter response of the pair, alpha beyond it.

    For `linear_preference_loss(token_weights=...)`, of the policy and of the reference alike. alpha 1 is the loss as it
    is, 0 cuts the longer response off.

    Args:
        mask: bool, which tokens are scored (targets != ignore_index): padded [S, T], or packed [N] with `cu_seqlens`
            ([S + 1] offsets on the host); first half chosen, second half rejected.
        alpha: 0 to 1.

    Returns:
        fp32, the shape of mask. Nothing synchronises.
    """
    check_number("alpha", alpha, least=0)
    check(alpha <= 1, "alpha", alpha, "a number in [0, 1]")
    check(mask.dtype == torch.bool, "mask", mask.dtype, "bool")
    check(mask.dim() == (2 if cu_seqlens is None else 1), "mask", tuple(mask.shape), "[S, T], or [N] with cu_seqlens")
    sequences = mask.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    check(sequences % 2 == 0, "mask", f"of {sequences} sequences", "an even number: chosen, then rejected")
    position = mask.cumsum(-1)
    if cu_seqlens is None:
        lengths = mask.sum(-1)
    else:
        ends = torch.nn.functional.pad(position, (1, 0))[torch.as_tensor(cu_seqlens, device=mask.device)]
        lengths = ends.diff()
        sizes = torch.as_tensor(cu_seqlens).diff().to(mask.device)
        position = position - torch.repeat_interleave(ends[:-1], sizes, output_size=mask.shape[0])
    chosen, rejected = lengths.chunk(2)
    shorter = torch.minimum(chosen, rejected).repeat(2)
    if cu_seqlens is None:
        shorter = shorter[:, None]
    else:
        shorter = torch.repeat_interleave(shorter, sizes, output_size=mask.shape[0])
    return torch.where(position > shorter, alpha, 1.0)
