"""What the compiled rows take, checked in one place: a kernel that is given addresses checks nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import EXTRAS, FoldState, RowStats, Tile

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def tile(tile: Tile, out: Tensor | None = None, *, narrower_in_place: bool = True) -> Tile:
    """The tile with contiguous targets and bias. `out` may be `logits`, or (narrower_in_place) of fewer bytes over the
    memory of its own rows, but overlaps nothing else of it."""
    logits = tile.logits
    if logits.dim() != 2:
        raise ValueError(f"logits is {list(logits.shape)}; it takes [rows, cols]")
    matrix("logits", logits, logits)
    if out is not None:
        matrix("out", out, logits)
        own_rows = (
            out.data_ptr() == logits.data_ptr() and out.stride(0) * out.itemsize == logits.stride(0) * logits.itemsize
            and (out.itemsize == logits.itemsize or (narrower_in_place and out.itemsize < logits.itemsize))
        )
        if not own_rows and _overlap(logits, out):
            raise ValueError("out overlaps logits; it takes other memory, or rows that start where those of logits do")
    rows, cols = logits.shape
    bias = None if tile.bias is None else vector("bias", tile.bias, cols, logits, None)
    return tile._replace(targets=vector("targets", tile.targets, rows, logits, torch.int64), bias=bias)


def matrix(name: str, x: Tensor, like: Tensor) -> None:
    """Shape and device of `like`, columns contiguous."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it takes {like.device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it takes {', '.join(DTYPES.values())}")
    if x.shape != like.shape or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} is {list(x.shape)} with strides {x.stride()}; it takes {list(like.shape)} with contiguous columns"
        )


def vector(name: str, x: Tensor, size: int, like: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """A contiguous [size] on the device of `like`; dtype None: of any."""
    if tuple(x.shape) != (size,) or x.device != like.device:
        raise ValueError(f"{name} is {list(x.shape)} on {x.device}; it takes [{size}] on {like.device}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; it takes {dtype}")
    return x.contiguous()


def state(state: FoldState, logits: Tensor) -> FoldState:
    """As it is, for it is updated in place."""
    for name, x in state._asdict().items():
        if vector(f"state.{name}", x, logits.shape[0], logits) is not x:
            raise ValueError(f"state.{name} has stride {x.stride()}; it takes a contiguous tensor")
    return state


def stats(logits: Tensor, with_scale: bool, extras: tuple[str, ...]) -> RowStats:
    """Fresh vectors for what is asked for, each at 16 bytes."""
    unknown = set(extras) - set(EXTRAS)
    if unknown:
        raise ValueError(f"extras has {sorted(unknown)}; it takes {EXTRAS}")
    wanted = ("logp", "lse", *(("scale",) if with_scale else ()), *extras)
    rows = logits.shape[0]
    values = torch.empty(len(wanted), -(-rows // 4) * 4, dtype=torch.float32, device=logits.device)
    found = dict(zip(wanted, values[:, :rows], strict=True))
    return RowStats(found["logp"], found["lse"], found.get("scale"), *(found.get(name) for name in EXTRAS))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tiles have a byte between their first and last elements in common."""
    if not a.numel():
        return False
    (a_first, a_end), (b_first, b_end) = (
        (t.data_ptr(), t.data_ptr() + t.itemsize * ((t.shape[0] - 1) * t.stride(0) + t.shape[1])) for t in (a, b)
    )
    return max(a_first, b_first) < min(a_end, b_end)
