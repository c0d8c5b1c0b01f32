"""The row contract in C++ on the CPU (`csrc/cpu`): AVX-512, AVX2 or portable vectors, chosen when called.

Environment: FASTPREF_ISA=avx512bf16|avx512|avx2|portable forces an instruction set. Threads: `torch.get_num_threads()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES
from .extension import ExtensionRows

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
    return device.type == "cpu" and dtype in DTYPES


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


_rows = ExtensionRows(_native, _native, "cpu", lambda _: (torch.get_num_threads(),))
residual, fold = _rows.residual, _rows.fold
residual_given_lse, gradient_given_lse = _rows.residual_given_lse, _rows.gradient_given_lse


# What tail.py asks of residuals.


def peaks(stash: Tensor, scale: Tensor, peak: Tensor, total: Tensor, squares: Tensor) -> None:
    found = (x.data_ptr() for x in (peak, total, squares))
    _native.peaks(_residuals(stash, scale), *found, torch.get_num_threads())


def split(stash: Tensor, columns: Tensor, active: Tensor, rest: Tensor) -> None:
    size, threads = columns.shape[0], torch.get_num_threads()
    _native.split(_residuals(stash, rest), columns.data_ptr(), size, _rows.out(active), rest.data_ptr(), threads)


def add_rows(total: Tensor, part: Tensor, columns: Tensor) -> None:
    sizes, threads = (columns.shape[0], total.shape[1]), torch.get_num_threads()
    _native.add_rows(total.data_ptr(), _rows.out(part), columns.data_ptr(), *sizes, threads)


def _residuals(stash: Tensor, scale: Tensor) -> Any:
    dtype = DTYPES[stash.dtype]
    return _native.Residuals(stash.data_ptr(), dtype, stash.stride(0), *stash.shape, scale.data_ptr())
