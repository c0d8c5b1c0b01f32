"""The row contract: sweeps over a `[rows, cols]` tile of logits. Knows no loss, no schedule and no GEMM.

Every implementation (`reference`, `native`, ...) is a module with these four functions, one sweep each:

    residual(logits, targets, out, *, transform, bias, ignore_index, extras) -> RowStats
        A tile over the WHOLE vocabulary. Per row: log-prob of the target, lse, and the residual row
        U = onehot(target) - softmax(z), written to `out` up to a late row scale:

            d logp / d logits = scale[:, None] * out          (logits before bias, scale, softcap, temperature)

        `out` may be None (forward only), may be `logits` itself, and may be another buffer, also of a narrower dtype
        (bf16 stash under fp32 logits), but must not overlap `logits` in any other way.

    fold(logits, targets, state, *, col_offset, transform, bias, ignore_index) -> None
        One slice of the vocabulary, columns [col_offset, col_offset + cols): updates the running maximum, sum of
        exponentials and target logit of `FoldState` in place. `fold_finish` turns the state into log-probs.

    residual_given_lse(logits, targets, lse, out, *, col_offset, transform, bias, ignore_index) -> None
        U of one slice of the vocabulary once lse is known:
            d logp / d logits = transform.row_factor * out

    gradient_given_lse(logits, targets, lse, entropy, grad_logps, grad_entropy, out, *, col_offset, transform, bias,
                       ignore_index) -> None
        The same for g_l logp + g_H H, H = lse - sum p z, once the entropy too is known; g_l and g_H are [rows]:
            d (g_l logp + g_H H) / d logits = transform.row_factor * out
        that is out = g_l (onehot - p) - g_H p (z - lse + H), times the softcap's derivative. Whoever stores `out` in
        fp16 keeps g_l and g_H near 1 and multiplies later.

What holds for all four:
- z = softcap(logit_scale * (logits + bias)) / temperature, softcap(u) = c tanh(u / c); `out` includes derivatives.
- logits: [rows, cols], fp32 / bf16 / fp16 (fp64 too in `reference`), last dimension contiguous, any row stride.
- lse, entropy, grad_logps, grad_entropy: [rows], contiguous, fp32 (fp64 for fp64 logits).
- targets: [rows] int64. A row whose target is `ignore_index` is not read at all: logp 0, lse 0, scale 0, extras 0 and
  zeros in `out`, so that whatever lies in a padding row stays there. Any other target outside [0, vocab) gives logp NaN
  and never an access out of bounds (in a sliced sweep: a target that no slice contains).
- Statistics are fp32 (fp64 for fp64 logits). NaN or inf in a row shows in that row's log-prob and in no other's.
- A column whose z is -inf has probability 0, residual 0 and no part in the entropy or its gradient.

The late scale is what makes one sweep enough: out holds `E - s * onehot` with E = exp(z - m), s = sum E, and
scale = -row_factor / s, where m need not be the row's maximum, only near it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
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


BACKENDS = ("reference", "native", "triton", "cuda")
_MODULES = {"reference": "reference", "native": "native", "triton": "triton_rows", "cuda": "cuda"}


@dataclass(frozen=True)
class Availability:
    backend: str
    available: bool
    why: str  # why not, or what it runs on


def availability(backend: str, device: torch.device | None = None) -> Availability:
    """Whether a backend's module imports and works on this machine (on this device), and why not."""
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[backend]}")
    except ImportError as error:
        return Availability(backend, False, str(error))
    return Availability(backend, *module.available(device))


_usable = lru_cache(maxsize=None)(lambda backend, device: availability(backend, device).available)


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The implementation for tiles on `device` with residuals of `dtype`; None or "auto" takes the fastest that works.

    The environment variable FASTPREF_BACKEND names one for every call that names none.
    """
    backend = backend or os.environ.get("FASTPREF_BACKEND") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes None, 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        backend = _fastest(device, dtype)
    else:
        found = availability(backend, device)
        if not found.available:
            raise ValueError(f"backend {backend!r} does not work here: {found.why}")
    module = importlib.import_module(f"{__name__}.{_MODULES[backend]}")
    if not module.supports(device, dtype):
        raise ValueError(
            f"backend {backend!r} does not take {dtype} on {device.type}; backend=None chooses one that does"
        )
    return module


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64 or device.type not in ("cpu", "cuda"):
        return "reference"
    wanted = ["native"] if device.type == "cpu" else ["triton", "cuda"]
    fp16 = dtype == torch.float16 and device.type == "cuda" and _usable("cuda", device)
    if fp16 and torch.cuda.get_device_capability(device) >= (9, 0):
        # Clusters hold a row and write it normalised, in the whole of fp16's range. Triton's one sweep leaves 3 nats of
        # room above every maximum that it meets, and goes back over the row each time that is not enough.
        wanted.reverse()
    for backend in wanted:
        if _usable(backend, device):
            return backend
    why = "; ".join(f"{backend}: {availability(backend, device).why}" for backend in wanted)
    warnings.warn(
        f"fastpref: no fast row kernels on {device} ({why}); using the slower reference rows", stacklevel=4
    )
    return "reference"


def scale_rows(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """out = x * w[:, None], [rows, width], in fp32 and rounded once; where w is 0 exactly 0, whatever x holds."""
    if x.device.type == "cuda" and _usable("triton", x.device):
        from . import triton_rows

        if all(tensor.dtype in triton_rows.DTYPES for tensor in (x, out)):
            return triton_rows.scale_rows_(x, w, out)
    if x.device.type != "cpu":
        return torch.mul(x, w[:, None], out=out).masked_fill_((w == 0)[:, None], 0.0)
    # Of mixed dtypes torch makes whole fp32 copies.
    step = x.shape[0] if x.dtype == w.dtype == out.dtype else min(x.shape[0] // 16, 128)
    step = max(step, 1)
    for start in range(0, x.shape[0], step):
        end = start + step
        torch.mul(x[start:end], w[start:end, None], out=out[start:end])
    nothing = w == 0
    return out.masked_fill_(nothing[:, None], 0.0) if nothing.any() else out


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor *= factor (one float on its device): no pass over `tensor` where it is 1, no synchronisation to know."""
    if tensor.device.type == "cpu":
        return tensor if factor.item() == 1.0 else tensor.mul_(factor.item())
    for backend in ("triton", "cuda") if tensor.device.type == "cuda" else ():
        if _usable(backend, tensor.device):
            module = importlib.import_module(f"{__name__}.{_MODULES[backend]}")
            scaled: Tensor = module.scale_unless_one_(tensor, factor)
            return scaled
    return tensor.mul_(factor)
