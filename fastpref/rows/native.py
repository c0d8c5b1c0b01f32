"""The row contract in C++ on the CPU (`csrc/cpu`): AVX-512, AVX2 or portable vectors, chosen when called.

Environment: FASTPREF_ISA=avx512bf16|avx512|avx2|portable forces an instruction set. Threads: `torch.get_num_threads()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import EXTRAS, FoldState, RowStats, Transform

try:
    from fastpref import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _why_not = f"the extension fastpref._native is not built: {error}"

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def available() -> tuple[bool, str]:
    if _native is None:
        return False, _why_not
    return True, f"CPU, {_native.isa()}, {torch.get_num_threads()} threads"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in _DTYPES


def advise_huge(tensor: Tensor) -> bool:
    """Asks for huge pages under a fresh CPU buffer, before anything is written to it; False where that has no effect.

    Where /sys/kernel/mm/transparent_hugepage/enabled says `madvise`, the default of most distributions, Linux grants
    huge pages only on request. There the first writing of 128 MiB from `torch.empty` takes 67 ms without and 8 ms with
    them (64 page faults in place of 32,768), the second 4 ms either way.
    """
    if _native is None or tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    return _native.advise_huge(storage.data_ptr(), storage.nbytes())


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous CPU tensor of this shape: C++ sees only its address."""
    if tuple(tensor.shape) != shape or tensor.device.type != "cpu" or dtype not in (None, tensor.dtype):
        wanted = f"{list(shape)} {dtype or ''}".strip()
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it takes {wanted} on cpu")
    return tensor.contiguous()


def _checked_tile(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}; it takes float32, bfloat16, float16 on cpu")
    if tuple(tensor.shape) != shape or (shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} is {list(tensor.shape)} with strides {tensor.stride()}; "
            f"it takes {list(shape)} with contiguous columns"
        )
    return tensor


def _tile(
    logits: Tensor, targets: Tensor, transform: Transform, bias: Tensor | None, ignore_index: int, col_offset: int
) -> tuple[object, tuple]:
    """The C++ view of a tile, and the tensors that must live as long as it does."""
    if logits.dim() != 2:
        raise ValueError(f"logits is {list(logits.shape)}; it takes [rows, cols]")
    rows, cols = logits.shape
    _checked_tile("logits", logits, (rows, cols))
    targets = _checked("targets", targets, (rows,), torch.int64)
    if bias is not None:
        bias = _checked("bias", bias, (cols,)).float()
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
    _checked_tile("out", out, tuple(logits.shape))
    return _native.Out(out.data_ptr(), _DTYPES[out.dtype], out.stride(0))


def residual(
    logits: Tensor,
    targets: Tensor,
    out: Tensor | None,
    *,
    transform: Transform,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    extras: tuple[str, ...] = (),
) -> RowStats:
    tile, alive = _tile(logits, targets, transform, bias, ignore_index, 0)
    wanted = ("logp", "lse", *(("scale",) if out is not None else ()), *extras)
    found = dict(zip(wanted, torch.empty(len(wanted), logits.shape[0]), strict=True))
    names = ("logp", "lse", "scale", *EXTRAS)
    stats = _native.Stats(*(found[name].data_ptr() if name in found else 0 for name in names))
    _native.residual(tile, _out(out, logits), stats, torch.get_num_threads())
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
    for name, value in state._asdict().items():
        if _checked(f"state.{name}", value, (logits.shape[0],), torch.float32) is not value:
            raise ValueError(f"state.{name} has stride {value.stride()}; it takes a contiguous tensor")
    _native.fold(tile, _native.FoldState(*(value.data_ptr() for value in state)), torch.get_num_threads())
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
    lse = _checked("lse", lse, (logits.shape[0],), torch.float32)
    _native.residual_given_lse(tile, lse.data_ptr(), _out(out, logits), torch.get_num_threads())
    del alive
