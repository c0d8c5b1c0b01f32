"""Tensors as the C++ rows see them: checked here, and then only addresses, sizes and strides. For native.py (CPU) and
cuda.py; `device` is the type of device that the caller's kernels run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import EXTRAS, FoldState, RowStats, Transform

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def vector(name: str, x: Tensor, size: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous [size]."""
    if tuple(x.shape) != (size,) or x.device != device:
        raise ValueError(f"{name} is {list(x.shape)} on {x.device}; it takes [{size}] on {device}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; it takes {dtype}")
    return x.contiguous()


def _check_matrix(name: str, x: Tensor, shape: tuple[int, ...], device: str) -> None:
    if x.device.type != device:
        raise ValueError(f"{name} is on {x.device}; it takes {device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it takes {', '.join(DTYPES.values())}")
    if tuple(x.shape) != shape or (shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} is {list(x.shape)} with strides {x.stride()}; it takes {list(shape)} with contiguous columns"
        )


def tile(
    native: Any,
    device: str,
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    bias: Tensor | None,
    ignore_index: int,
    col_offset: int = 0,
) -> tuple[Any, tuple]:
    """`native.Tile`, and the tensors that must live until its kernel is launched (on the CPU: until it is done)."""
    if logits.dim() != 2:
        raise ValueError(f"logits is {list(logits.shape)}; it takes [rows, cols]")
    rows, cols = logits.shape
    _check_matrix("logits", logits, (rows, cols), device)
    targets = vector("targets", targets, rows, logits.device, torch.int64)
    if bias is not None:
        bias = vector("bias", bias, cols, logits.device).float()
    view = native.Tile(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.stride(0),
        rows,
        cols,
        targets.data_ptr(),
        ignore_index,
        col_offset,
        0 if bias is None else bias.data_ptr(),
        transform.logit_scale,
        transform.softcap or 0.0,
        transform.temperature,
    )
    return view, (logits, targets, bias)


def out(native: Any, tensor: Tensor | None, logits: Tensor) -> Any:
    """`native.Out` of a tile that may be `logits`, or narrower over the memory of its own rows, but overlaps nothing
    else of it."""
    if tensor is None:
        return native.Out(0, "float32", 0)
    _check_matrix("out", tensor, tuple(logits.shape), logits.device.type)
    if tensor.device != logits.device:
        raise ValueError(f"out is on {tensor.device}; it takes {logits.device}")
    if logits.numel():
        (first, end, pitch), (out_first, out_end, out_pitch) = (
            (t.data_ptr(), t.data_ptr() + ((t.shape[0] - 1) * t.stride(0) + t.shape[1]) * size, t.stride(0) * size)
            for t, size in ((logits, logits.element_size()), (tensor, tensor.element_size()))
        )
        own_rows = out_first == first and out_pitch == pitch and tensor.element_size() <= logits.element_size()
        if max(first, out_first) < min(end, out_end) and not own_rows:
            raise ValueError("out overlaps logits; it takes other memory, or rows that start where those of logits do")
    return native.Out(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0))


def stats(native: Any, logits: Tensor, with_scale: bool, extras: tuple[str, ...]) -> tuple[Any, RowStats]:
    """`native.Stats` over fresh vectors, and those."""
    unknown = set(extras) - set(EXTRAS)
    if unknown:
        raise ValueError(f"extras has {sorted(unknown)}; it takes {EXTRAS}")
    wanted = ("logp", "lse", *(("scale",) if with_scale else ()), *extras)
    values = torch.empty(len(wanted), logits.shape[0], dtype=torch.float32, device=logits.device)
    found = dict(zip(wanted, values, strict=True))
    view = native.Stats(*(found[name].data_ptr() if name in found else 0 for name in RowStats._fields))
    return view, RowStats(**{"scale": None, **found})


def state(native: Any, state: FoldState, logits: Tensor) -> Any:
    """`native.FoldState`, which is updated in place."""
    for name, x in state._asdict().items():
        if vector(f"state.{name}", x, logits.shape[0], logits.device, torch.float32) is not x:
            raise ValueError(f"state.{name} has stride {x.stride()}; it takes a contiguous tensor")
    return native.FoldState(*(x.data_ptr() for x in state))


def given(native: Any, logits: Tensor, **vectors: Tensor) -> tuple[Any, tuple]:
    """`native.Given` (lse, and for the entropy's gradient entropy, grad_logps, grad_entropy), and what must live."""
    rows, device = logits.shape[0], logits.device
    found = {name: vector(name, x, rows, device, torch.float32) for name, x in vectors.items()}
    names = ("lse", "entropy", "grad_logps", "grad_entropy")
    view = native.Given(*(found[name].data_ptr() if name in found else 0 for name in names))
    return view, tuple(found.values())
