"""The row contract in C++ on the CPU (`csrc/cpu`): AVX-512, AVX2 or portable vectors, chosen when called.

Environment: FASTPREF_ISA=avx512bf16|avx512|avx2|portable forces an instruction set. Threads: `torch.get_num_threads()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import FoldState, RowStats, Transform, views

try:
    from fastpref import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _why_not = f"the extension fastpref._native is not built: {error}"


def available(device: torch.device | None = None) -> tuple[bool, str]:
    if _native is None:
        return False, _why_not
    return True, f"CPU, {_native.isa()}, {torch.get_num_threads()} threads"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in views.DTYPES


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
    tile, alive = views.tile(_native, "cpu", logits, targets, transform, bias, ignore_index)
    view, found = views.stats(_native, logits, out is not None, extras)
    _native.residual(tile, views.out(_native, out, logits), view, torch.get_num_threads())
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
    tile, alive = views.tile(_native, "cpu", logits, targets, transform, bias, ignore_index, col_offset)
    _native.fold(tile, views.state(_native, state, logits), torch.get_num_threads())
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
    tile, alive = views.tile(_native, "cpu", logits, targets, transform, bias, ignore_index, col_offset)
    given, vectors = views.given(_native, logits, lse=lse)
    _native.residual_given_lse(tile, given, views.out(_native, out, logits), torch.get_num_threads())
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
    tile, alive = views.tile(_native, "cpu", logits, targets, transform, bias, ignore_index, col_offset)
    given, vectors = views.given(
        _native, logits, lse=lse, entropy=entropy, grad_logps=grad_logps, grad_entropy=grad_entropy
    )
    _native.gradient_given_lse(tile, given, views.out(_native, out, logits), torch.get_num_threads())
    del alive, vectors


def peaks(stash: Tensor, scale: Tensor, peak: Tensor, total: Tensor, squares: Tensor) -> None:
    found = (x.data_ptr() for x in (peak, total, squares))
    _native.peaks(_residuals(stash, scale), *found, torch.get_num_threads())


def split(stash: Tensor, columns: Tensor, active: Tensor, rest: Tensor) -> None:
    out = _native.Out(active.data_ptr(), views.DTYPES[active.dtype], active.stride(0))
    threads = torch.get_num_threads()
    _native.split(_residuals(stash, rest), columns.data_ptr(), columns.shape[0], out, rest.data_ptr(), threads)


def add_rows(total: Tensor, part: Tensor, columns: Tensor) -> None:
    rows = _native.Out(part.data_ptr(), views.DTYPES[part.dtype], part.stride(0))
    threads = torch.get_num_threads()
    _native.add_rows(total.data_ptr(), rows, columns.data_ptr(), columns.shape[0], total.shape[1], threads)


def _residuals(stash: Tensor, scale: Tensor) -> Any:
    dtype = views.DTYPES[stash.dtype]
    return _native.Residuals(stash.data_ptr(), dtype, stash.stride(0), *stash.shape, scale.data_ptr())
