"""The row contract: sweeps over a `[rows, cols]` tile of logits. Knows no loss, no schedule and no GEMM.

Every implementation (`reference`, `native`, ...) is a module with these four functions, one sweep of a `Tile` each:

    residual(tile, out, extras=()) -> RowStats
        A tile over the WHOLE vocabulary. Per row: log-prob of the target, lse, and the residual row
        U = onehot(target) - softmax(z), written to `out` up to a late row scale:

            d logp / d logits = scale[:, None] * out          (logits before bias, scale, softcap, temperature)

        `out` may be None (forward only), may be `logits` itself, and may be another buffer, also of a narrower dtype
        (bf16 stash under fp32 logits), but must not overlap `logits` in any other way.

    fold(tile, state) -> None
        One slice of the vocabulary, columns [col_offset, col_offset + cols): updates the running maximum, sum of
        exponentials and target logit of `FoldState` in place. `fold_finish` turns the state into log-probs.

    residual_given_lse(tile, lse, out) -> None
        U of one slice of the vocabulary once lse is known:
            d logp / d logits = transform.row_factor * out

    gradient_given_lse(tile, lse, entropy, grad_logps, grad_entropy, out) -> None
        The same for g_l logp + g_H H, H = lse - sum p z, once the entropy too is known; g_l and g_H are [rows]:
            d (g_l logp + g_H H) / d logits = transform.row_factor * out
        that is out = g_l (onehot - p) - g_H p (z - lse + H), times the softcap's derivative. Whoever stores `out` in
        fp16 keeps g_l and g_H near 1 and multiplies later.

What holds for all four:
- z = softcap(logit_scale * (logits + bias)) / temperature, softcap(u) = c tanh(u / c); `out` includes derivatives.
- lse, entropy, grad_logps, grad_entropy: [rows], contiguous, fp32 (fp64 for fp64 logits).
- A row whose target is `ignore_index` is not read at all: logp 0, lse 0, scale 0, extras 0 and
  zeros in `out`, so that whatever lies in a padding row stays there. Any other target outside [0, vocab) gives logp NaN
  and never an access out of bounds (in a sliced sweep: a target that no slice contains).
- Statistics are fp32 (fp64 for fp64 logits). NaN or inf in a row shows in that row's log-prob and in no other's.
- A column whose z is -inf has probability 0, residual 0 and no part in the entropy or its gradient.

The late scale is what makes one sweep enough: out holds `E - s * onehot` with E = exp(z - m), s = sum E, and
scale = -row_factor / s, where m need not be the row's maximum, only near it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXTRAS = ("entropy", "top1", "mean_logit", "log_sum_p2")


@dataclass(frozen=True)
class Transform:
    """z = softcap(logit_scale * (logits + bias)) / temperature, softcap(u) = c tanh(u / c), None: no cap."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def row_factor(self) -> float:
        """The part of dz/dlogits that is the same for every column, and so belongs to the row scale."""
        return self.logit_scale / self.temperature


class Tile(NamedTuple):
    """Logits of some rows, over the whole vocabulary or one slice of it, and what makes z and log-probs of them."""

    logits: Tensor  # [rows, cols] fp32 / bf16 / fp16 (`reference`: fp64 too), last dimension contiguous, any row stride
    targets: Tensor  # [rows] int64, of the vocabulary
    transform: Transform = Transform()
    bias: Tensor | None = None  # [cols]
    ignore_index: int = -100
    col_offset: int = 0  # where a slice begins


class RowStats(NamedTuple):
    """Per row, [rows], fp32 (fp64 for fp64 logits). What was not asked for is None."""

    logp: Tensor  # z[target] - lse; 0 where ignored
    lse: Tensor  # log sum exp z
    scale: Tensor | None  # d logp / d logits = scale[:, None] * out; None when out is None
    entropy: Tensor | None = None  # lse - sum p z, nats
    top1: Tensor | None = None  # 1.0 where the target is the first of the row's largest z; 0.0 beside NaN or +inf
    mean_logit: Tensor | None = None  # mean of z over the columns
    log_sum_p2: Tensor | None = None  # log sum p^2


class FoldState(NamedTuple):
    """Running statistics of a row over the slices of the vocabulary seen so far, [rows], fp32 (fp64)."""

    maximum: Tensor
    sum_exp: Tensor  # sum exp(z - maximum)
    target: Tensor  # z[target]; NaN until its slice was seen

    @classmethod
    def new(cls, rows: int, *, dtype: torch.dtype, device: torch.device) -> FoldState:
        def full(value: float) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return cls(full(-float("inf")), full(0.0), full(float("nan")))


def fold_finish(state: FoldState, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(logp, lse) of rows whose every column was folded; 0 where ignored."""
    log_sum, ignored = state.sum_exp.log(), targets == ignore_index
    # In this order: target - (maximum + log_sum) would lose 1e-3 nat where the logits are 1e4.
    logp = (state.target - state.maximum) - log_sum
    return logp.masked_fill_(ignored, 0.0), (state.maximum + log_sum).masked_fill_(ignored, 0.0)


def stats_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if logits_dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """In which long sums are taken: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
