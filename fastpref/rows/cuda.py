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

from .checks import DTYPES
from .contract import RowStats, Tile
from .extension import ExtensionRows

_native: Any = None
try:
    _native = importlib.import_module("fastpref._native")
except ImportError as error:
    _why_not = f"the extension fastpref._native is not built: {error}"
else:
    _why_not = "fastpref._native was built without CUDA: put nvcc on PATH or set CUDACXX, and install again"

_CAPABILITY = 80


def available(device: torch.device | None = None) -> tuple[bool, str]:
    if _rows.kernels is None:
        return False, _why_not
    try:
        capabilities = _rows.kernels.devices()
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
    return device.type == _rows.device and dtype in DTYPES


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device index and current stream: the launch is ordered like any torch operation on this tensor."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


_rows = ExtensionRows(_native, getattr(_native, "cuda", None), "cuda", _where)
fold, residual_given_lse, gradient_given_lse = _rows.fold, _rows.residual_given_lse, _rows.gradient_given_lse


@lru_cache(maxsize=64)
def _cluster_size(dtype: torch.dtype, cols: int, device: int) -> int:
    return _rows.kernels.cluster_size(_native.Tile(0, DTYPES[dtype], 0, 0, cols, 0, 0, 0, 0, 1.0, 0.0, 1.0), device)


def residual(
    tile: Tile, out: Tensor | None, extras: tuple[str, ...] = (), *, cluster: bool | None = None
) -> RowStats:
    """See the contract (contract.py). Beyond it, `out` may be a narrower view of the memory of its own rows, and
    `cluster` picks the sweep for measurements (True raises where a cluster cannot hold a row)."""
    if cluster is None:
        fp16, logits = out is not None and out.dtype == torch.float16, tile.logits
        cluster = fp16 and _cluster_size(logits.dtype, logits.shape[-1], _rows.where(logits)[0]) > 0
    return _rows.residual(tile, out, extras, cluster)
