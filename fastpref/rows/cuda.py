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

from . import FoldState, RowStats, Transform, views

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
_CAPABILITY = 80


def available(device: torch.device | None = None) -> tuple[bool, str]:
    if _kernels is None:
        return False, _why_not
    try:
        capabilities = _kernels.devices()
    except RuntimeError as error:
        return False, str(error)
    if not torch.cuda.is_available():
        return False, f"torch {torch.__version__} has no CUDA"
    if device is not None and device.type == "cuda":
        capabilities = [capabilities[torch.cuda.current_device() if device.index is None else device.index]]
    if max(capabilities) < _CAPABILITY:
        high = max(capabilities)
        return False, f"it needs compute capability 8.0 or newer, and the device has {high // 10}.{high % 10}"
    return True, f"CUDA C++, compute capability {', '.join(f'{c // 10}.{c % 10}' for c in capabilities)}"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == _DEVICE and dtype in views.DTYPES


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device index and current stream: the launch is ordered like any torch operation on this tensor."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@lru_cache(maxsize=64)
def _cluster_size(dtype: torch.dtype, cols: int, device: int) -> int:
    return _kernels.cluster_size(_native.Tile(0, views.DTYPES[dtype], 0, 0, cols, 0, 0, 0, 0, 1.0, 0.0, 1.0), device)


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
    tile, alive = views.tile(_native, _DEVICE, logits, targets, transform, bias, ignore_index)
    out_view = views.out(_native, out, logits)
    view, found = views.stats(_native, logits, out is not None, extras)
    device, stream = _where(logits)
    if cluster is None:
        fp16 = out is not None and out.dtype == torch.float16
        cluster = fp16 and _cluster_size(logits.dtype, logits.shape[1], device) > 0
    _kernels.residual(tile, out_view, view, cluster, device, stream)
    del alive
    return found


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
    tile, alive = views.tile(_native, _DEVICE, logits, targets, transform, bias, ignore_index, col_offset)
    _kernels.fold(tile, views.state(_native, state, logits), *_where(logits))
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
    tile, alive = views.tile(_native, _DEVICE, logits, targets, transform, bias, ignore_index, col_offset)
    given, vectors = views.given(_native, logits, lse=lse)
    _kernels.residual_given_lse(tile, given, views.out(_native, out, logits), *_where(logits))
    del alive, vectors


def gradient_given_lse(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor,
    out: Tensor,
    *,
    col_offset: int,
    transform: Transform,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> None:
    tile, alive = views.tile(_native, _DEVICE, logits, targets, transform, bias, ignore_index, col_offset)
    given, vectors = views.given(
        _native, logits, lse=lse, entropy=entropy, grad_logps=grad_logps, grad_entropy=grad_entropy
    )
    _kernels.gradient_given_lse(tile, given, views.out(_native, out, logits), *_where(logits))
    del alive, vectors


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor *= factor, where factor is one float on the same device: nothing is read or written if it is 1, and the
    host does not wait to know."""
    if factor.numel() != 1 or factor.device != tensor.device:
        raise ValueError(f"factor is {list(factor.shape)} on {factor.device}; it takes one float on {tensor.device}")
    if not tensor.is_contiguous() or not supports(tensor.device, tensor.dtype):
        return tensor.mul_(factor.reshape(()))
    factor = factor.float()
    x = _native.Out(tensor.data_ptr(), views.DTYPES[tensor.dtype], 0)
    _kernels.scale_unless_one(x, tensor.numel(), factor.data_ptr(), *_where(tensor))
    return tensor
