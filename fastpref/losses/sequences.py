"""What a loss sees: sequence log-probs and what goes with them, and the counts that means divide by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from .late import torch

if TYPE_CHECKING:
    from torch import Tensor

Number: TypeAlias = "int | float | Tensor"


@dataclass(frozen=True)
class Totals:
    """What a loss divides by. Given explicitly: the counts of the GLOBAL batch, so that the losses and gradients of its
    parts (micro-batches, ranks) add up to those of the whole. Python numbers or 0-dim tensors.
    """

    sequences: Number  # pairs count two
    tokens: Number  # scored tokens of all sequences
    chosen_tokens: Number  # scored tokens of the first half

    @property
    def pairs(self) -> Number:
        return self.sequences / 2


@dataclass(frozen=True)
class SequenceLogps:
    """What a loss sees. Tensors are [S] (pairs: first half chosen, second half rejected) unless stated.

    Log-probs are in nats, summed over scored tokens (times their token weights); fp32, or fp64 for fp64 inputs.
    In a plan that takes the batch group by group these are the sequences of one group, and `totals` still those of
    the batch: reduce with `pair_mean`, `sequence_mean` and `token_mean`, and the groups add up.
    """

    logps: Tensor  # differentiable
    lengths: Tensor  # scored tokens, same dtype as logps
    totals: Totals
    ref_logps: Tensor | None = None
    desirable: Tensor | None = None  # bool (KTO)
    kl: Tensor | None = None  # scalar: KTO's baseline, before it is clamped at 0
    extras: dict[str, Tensor] | None = None  # sums over scored tokens of what `Loss.needs_extras` names; no gradient
    unweighted: Tensor | None = None  # logps, each token counting once, as in extras; None: that is what logps is

    @property
    def chosen(self) -> Tensor:
        return self.logps.chunk(2)[0]

    @property
    def rejected(self) -> Tensor:
        return self.logps.chunk(2)[1]

    @property
    def chosen_lengths(self) -> Tensor:
        return self.lengths.chunk(2)[0]

    @property
    def rejected_lengths(self) -> Tensor:
        return self.lengths.chunk(2)[1]

    @property
    def reference(self) -> Tensor:
        """ref_logps, [S]; ValueError where there are none."""
        if self.ref_logps is None:
            raise ValueError("ref_logps is None; this loss takes ref_logps, or ref_hidden and ref_weight")
        return self.ref_logps

    @property
    def logratios(self) -> Tensor:
        """r = logp - ref_logp, [S]."""
        return self.logps - self.reference

    @property
    def margins(self) -> Tensor:
        """D = r_chosen - r_rejected, [S / 2]."""
        chosen, rejected = self.logratios.chunk(2)
        return chosen - rejected

    @property
    def per_length(self) -> Tensor:
        """1 / |y|, [S]: turns sums over tokens into means; |y| counts as at least 1."""
        return 1 / self.lengths.clamp(min=1)

    @property
    def chosen_token_nll(self) -> Tensor:
        """-logp_chosen / (mean length of the batch's chosen responses), [S / 2].

        Its `pair_mean` is the token mean: - sum of logp_chosen / number of scored chosen tokens of the batch.
        """
        return -self.chosen * (self.totals.pairs / _at_least_one(self.totals.chosen_tokens))

    def extra(self, name: str) -> Tensor:
        """[S]; ValueError where the head was not asked for it."""
        if self.extras is None or name not in self.extras:
            raise ValueError(f"extras has no {name!r}; it takes the sums that the loss names in needs_extras")
        return self.extras[name]

    def pair_mean(self, per_pair: Tensor) -> Tensor:
        """Sum over these pairs, divided by the number of pairs of the batch."""
        return per_pair.sum() / self.totals.pairs

    def sequence_mean(self, per_sequence: Tensor) -> Tensor:
        """Sum over these sequences, divided by the number of sequences of the batch."""
        return per_sequence.sum() / self.totals.sequences

    def token_mean(self, per_sequence: Tensor) -> Tensor:
        """Sum over these sequences, divided by the number of scored tokens of the batch (at least one)."""
        return per_sequence.sum() / _at_least_one(self.totals.tokens)

    def select(self, start: int, end: int, *, pairs: bool) -> SequenceLogps:
        """The pairs (or sequences) [start, end) with the same totals."""

        half = self.logps.shape[0] // 2
        if (start, end) == (0, half if pairs else self.logps.shape[0]):
            return self

        def take(x: Tensor) -> Tensor:
            return torch.cat((x[start:end], x[half + start : half + end])) if pairs else x[start:end]

        return replace(
            self,
            logps=take(self.logps),
            lengths=take(self.lengths),
            ref_logps=None if self.ref_logps is None else take(self.ref_logps),
            desirable=None if self.desirable is None else take(self.desirable),
            extras=None if self.extras is None else {name: take(x) for name, x in self.extras.items()},
            unweighted=None if self.unweighted is None else take(self.unweighted),
        )


def _at_least_one(count: Number) -> Number:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
