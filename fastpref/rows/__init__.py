"""Row kernels: sweeps over tiles of logits. What they do is said in contract.py; here one of them is chosen."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .contract import EXTRAS, FoldState, RowStats, Tile, Transform, exact_dtype, fold_finish, stats_dtype

__all__ = [
    "BACKENDS", "EXTRAS", "Availability", "FoldState", "RowStats", "Tile", "Transform", "availability", "choose",
    "exact_dtype", "fold_finish", "scale_rows", "scale_unless_one_", "stats_dtype", "tail_kernels",
]

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


def tail_kernels(kernels: ModuleType, stash: Tensor) -> ModuleType:
    """The module whose `peaks`, `split` and `add_rows` tail.py takes: the call's own if it has them."""
    if hasattr(kernels, "peaks"):
        return kernels
    fast = stash.device.type == "cuda" and _usable("triton", stash.device)
    return importlib.import_module(f"{__name__}.{'triton_rows' if fast else 'reference'}")


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
    if tensor.device.type == "cuda" and _usable("triton", tensor.device):
        from . import triton_rows

        return triton_rows.scale_unless_one_(tensor, factor)
    return tensor.mul_(factor)
