"""Memory of a call on the CPU that is kept for the next one. On CUDA torch's own allocator does that.

The C library gives large buffers back to the system as soon as they are freed, and the next call pays for fresh pages:
the kernel clears them, and on a virtual machine with free page reporting they are the host's again after two seconds.
Writing 302 MiB for the first time, one thread of a Xeon, huge pages, CPU time: 47 ms right after it was freed, 265 to
930 ms where 1 to 20 s lay between, as a trunk's passes do, and 35 ms where the buffer was kept.

A whole step, N 1536, H 576, V 49152, three seconds between calls, over its three bare GEMMs, one thread, CPU time: fp32
1.22 without and 1.02 with what is kept (1.06 with other implementations in between), bf16 1.10 and 1.00. The row sweep
is 41 of those 1,640 ms in fp32: it moves 14.9 GB/s in place, where filling the same buffer moves 17.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .plan import KEPT, MIB
from .rows import native

LEAST = 4 * MIB  # smaller buffers come from the C library's heap

_blocks: list[Any] = []  # numpy arrays of bytes, over memory of torch's, so that its profiler sees it
_lock = Lock()


def _holders(blocks: list[Any], i: int) -> int:
    return sys.getrefcount(blocks[i])


_IDLE = _holders([object()], 0)  # of a block that only the list holds; a tensor over one holds it too


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; of a large tensor on the CPU the memory is kept when it dies. Never in two tensors at a time,
    whatever their threads."""
    count = math.prod(shape)
    if device.type != "cpu" or count * dtype.itemsize < LEAST:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        whole = torch.frombuffer(_block(count * dtype.itemsize), dtype=dtype, count=count)
    own = torch.empty(0, dtype=dtype).set_(whole.untyped_storage())  # no view of another tensor
    return own.resize_(shape)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous."""
    return empty(tensor.shape, dtype or tensor.dtype, tensor.device)


def release_workspaces() -> None:
    """Gives back to the system what large buffers of earlier calls left (CPU; on CUDA: torch.cuda.empty_cache())."""
    with _lock:
        _blocks.clear()


def kept_bytes() -> int:
    """Held now, by tensors that live or for the next call."""
    with _lock:
        return sum(block.nbytes for block in _blocks)


def _block(nbytes: int) -> Any:
    """The smallest idle one that fits and is not more than twice as large, or a new one."""
    idle = sorted((i for i in range(len(_blocks)) if _holders(_blocks, i) == _IDLE), key=lambda i: _blocks[i].nbytes)
    for i in idle:
        if nbytes <= _blocks[i].nbytes <= 2 * nbytes:
            return _blocks[i]
    smaller = [i for i in idle if _blocks[i].nbytes < nbytes]
    # The new one will do for the largest of those too small: micro-batches differ, and every size would be kept.
    gone = smaller[-1:]
    room = KEPT - sum(_blocks[i].nbytes for i in idle if i not in gone)
    for i in idle:
        if room < nbytes and i not in gone:
            gone.append(i)
            room += _blocks[i].nbytes
    for i in sorted(gone, reverse=True):
        del _blocks[i]
    fresh = torch.empty(nbytes, dtype=torch.uint8)
    # Pages of 4 KiB cost more than writing them.
    native.advise_huge(fresh)
    block = fresh.numpy()
    if nbytes <= KEPT:
        _blocks.append(block)
    return block
