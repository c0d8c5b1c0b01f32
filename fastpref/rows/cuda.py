"""The row contract in CUDA C++ (`csrc/cuda`), for NVIDIA GPUs of compute capability 8.0 and newer.

Two ways through a row. The block sweep (`csrc/cuda/rows.cuh`) reads each logit once and writes an unnormalised `out`.
The cluster sweep (`csrc/cuda/cluster.cuh`, capability 9.0) holds the row in the shared memory of up to eight thread
blocks and writes `out` normalised; `residual` takes it for fp16, which makes the block sweep visit flat rows twice.

A row's logp and lse depend neither on `out`, its dtype and alignment nor on the tile's other rows: in the block sweep
they are equal to the last bit; the cluster sweep adds up in another order, in fp64, which nearly always rounds alike.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import EXTRAS, FoldState, RowStats, Transform

_native: Any = None
_kernels: Any = None
try:
    _native = importlib.import_module("fastpref._native")
except ImportError as error:
    _why_not = f"the extension fastpref._native is not built: {error}"
else:
    _kernels = getattr(_native, "cuda", None)
    _why_not = "fastpref._native was built without CUDA: put nvcc on PATH or set CUDACXX, and install again"

_DEVICE = "cuda"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_CAPABILITY = 80


def available() -> tuple[bool, str]:
    if _kernels is None:
        return False, _why_not
    try:
        capabilities = _kernels.devices()
    except RuntimeError as error:
        return False, str(error)
    if min(capabilities) < _CAPABILITY:
        low = min(capabilities)
        return False, f"it needs compute capability 8.0 or newer, and there is a device of {low // 10}.{low % 10}"
    if not torch.cuda.is_available():
        return False, f"torch {torch.__version__} has no CUDA"
    return True, f"CUDA C++, compute capability {', '.join(f'{c // 10}.{c % 10}' for c in capabilities)}"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == _DEVICE and dtype in _DTYPES


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device index and current stream: the launch is ordered like any torch operation on this tensor."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _check_vector(name: str, vector: Tensor, size: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
    if tuple(vector.shape) != (size,) or vector.device != device:
        raise ValueError(f"{name} is {list(vector.shape)} on {vector.device}; it takes [{size}] on {device}")
    if dtype is not None and vector.dtype != dtype:
        raise TypeError(f"{name} is {vector.dtype}; it takes {dtype}")


def _check_tile(name: str, tile: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tile.device != device or device.type != _DEVICE:
        raise ValueError(f"{name} is on {tile.device}; it takes {device if device.type == _DEVICE else _DEVICE}")
    if tile.dtype not in _DTYPES:
        raise TypeError(f"{name} is {tile.dtype}; it takes float32, bfloat16, float16")
    if tuple(tile.shape) != shape or (shape[1] > 1 and tile.stride(1) != 1):
        raise ValueError(
            f"{name} is {list(tile.shape)} with strides {tile.stride()}; it takes {list(shape)} with contiguous columns"
        )


def _tile(
    logits: Tensor, targets: Tensor, transform: Transform, bias: Tensor | None, ignore_index: int, col_offset: int
) -> tuple[object, tuple]:
    """The C++ view of a tile, and the tensors that must live until its kernel is launched."""
    if logits.dim() != 2:
        raise ValueError(f"logits is {list(logits.shape)}; it takes [rows, cols]")
    rows, cols = logits.shape
    _check_tile("logits", logits, (rows, cols), logits.device)
    _check_vector("targets", targets, rows, logits.device, torch.int64)
    targets = targets.contiguous()
    if bias is not None:
        _check_vector("bias", bias, cols, logits.device)
        bias = bias.float().contiguous()
    view = _native.Tile(
        logits.data_ptr(),
        _DTYPES[logits.dtype],
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


def _out(out: Tensor | None, logits: Tensor) -> object:
    if out is None:
        return _native.Out(0, "float32", 0)
    _check_tile("out", out, tuple(logits.shape), logits.device)
    if logits.numel():
        (first, end, pitch), (out_first, out_end, out_pitch) = (
            (t.data_ptr(), t.data_ptr() + ((t.shape[0] - 1) * t.stride(0) + t.shape[1]) * size, t.stride(0) * size)
            for t, size in ((logits, logits.element_size()), (out, out.element_size()))
        )
        own_rows = out_first == first and out_pitch == pitch and out.element_size() <= logits.element_size()
        if max(first, out_first) < min(end, out_end) and not own_rows:
            raise ValueError("out overlaps logits; it takes other memory, or rows that start where those of logits do")
    return _native.Out(out.data_ptr(), _DTYPES[out.dtype], out.stride(0))


@lru_cache(maxsize=64)
def _cluster_size(dtype: torch.dtype, cols: int, device: int) -> int:
    return _kernels.cluster_size(_native.Tile(0, _DTYPES[dtype], 0, 0, cols, 0, 0, 0, 0, 1.0, 0.0, 1.0), device)


def residual(
    logits: Tensor,
    targets: Tensor,
    out: Tensor | None,
    *,
    transform: Transform,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    extras: tuple[str, ...] = (),
    cluster: bool | None = None,
) -> RowStats:
    """See the contract in `fastpref.rows`. Beyond it, `out` may be a narrower view of the memory of its own rows, and
    `cluster` picks the sweep for measurements (True raises where a cluster cannot hold a row)."""
    tile, alive = _tile(logits, targets, transform, bias, ignore_index, 0)
    view = _out(out, logits)
    unknown = set(extras) - set(EXTRAS)
    if unknown:
        raise ValueError(f"extras has {sorted(unknown)}; it takes {EXTRAS}")
    device, stream = _where(logits)
    if cluster is None:
        fp16 = out is not None and out.dtype == torch.float16
        cluster = fp16 and _cluster_size(logits.dtype, logits.shape[1], device) > 0
    wanted = ("logp", "lse", *(("scale",) if out is not None else ()), *extras)
    values = torch.empty(len(wanted), logits.shape[0], dtype=torch.float32, device=logits.device)
    found = dict(zip(wanted, values, strict=True))
    names = ("logp", "lse", "scale", *EXTRAS)
    stats = _native.Stats(*(found[name].data_ptr() if name in found else 0 for name in names))
    _kernels.residual(tile, view, stats, cluster, device, stream)
    del alive
    return RowStats(**{"scale": None, **found})


def fold(
    logits: Tensor,
    targets: Tensor,
    state: FoldState,
    *,
    col_offset: int,
    transform: Transform,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> None:
    tile, alive = _tile(logits, targets, transform, bias, ignore_index, col_offset)
    for name, vector in state._asdict().items():
        _check_vector(f"state.{name}", vector, logits.shape[0], logits.device, torch.float32)
        if not vector.is_contiguous():
            raise ValueError(f"state.{name} has stride {vector.stride()}; it takes a contiguous tensor")
    _kernels.fold(tile, _native.FoldState(*(vector.data_ptr() for vector in state)), *_where(logits))
    del alive


def residual_given_lse(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    out: Tensor,
    *,
    col_offset: int,
    transform: Transform,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> None:
    tile, alive = _tile(logits, targets, transform, bias, ignore_index, col_offset)
    _check_vector("lse", lse, logits.shape[0], logits.device, torch.float32)
    lse = lse.contiguous()
    _kernels.residual_given_lse(tile, lse.data_ptr(), _out(out, logits), *_where(logits))
    del alive


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor *= factor, where factor is one float on the same device: nothing is read or written if it is 1, and the
    host does not wait to know."""
    if factor.numel() != 1 or factor.device != tensor.device:
        raise ValueError(f"factor is {list(factor.shape)} on {factor.device}; it takes one float on {tensor.device}")
    if not tensor.is_contiguous() or not supports(tensor.device, tensor.dtype):
        return tensor.mul_(factor.reshape(()))
    factor = factor.float()
    x = _native.Out(tensor.data_ptr(), _DTYPES[tensor.dtype], 0)
    _kernels.scale_unless_one(x, tensor.numel(), factor.data_ptr(), *_where(tensor))
    return tensor
