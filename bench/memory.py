"""Peak resident memory of one implementation on a CPU, in a process of its own: what the system sees, with everything
that torch's allocator does not count (GEMM libraries' scratch, packed operands, heap left over).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .harness import Cell, prepare, run, status_bytes
from .peers import MIB, Implementation, fastpref, peer
from .problem import DTYPES, Shape, make_batch


def peak_rss_mib(cell: Cell, implementation: Implementation) -> float | None:
    """High-water mark during one call minus what is resident before, minus the gradients; None where Linux's
    /proc/self/clear_refs does not allow it or the process fails.
    """
    what = {"shape": asdict(cell.shape), "cell": cell[1:], "threads": torch.get_num_threads()}
    what |= {"impl": implementation.name, "backend": implementation.backend, "budget": implementation.budget}
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(what)],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def _measure(what: dict) -> float:
    torch.set_num_threads(what["threads"])
    cell = Cell(Shape(**what["shape"]), *what["cell"])
    name = what["impl"]
    implementation = fastpref(what["backend"], what["budget"]) if name == "fastpref" else peer(name, "cpu")
    assert isinstance(implementation, Implementation)
    shape = cell.shape
    small = replace(shape, rows=2 * shape.sequences, vocab=2048)
    for batch in (make_batch(small, DTYPES[cell.dtype]), make_batch(shape, DTYPES[cell.dtype])):
        prepare(batch, cell.op)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from now
        before = status_bytes("VmRSS")
        # On the small batch it loads and initialises what is no memory of the call.
        run(implementation, batch, cell.op, cell.loss)
        grads = sum(x.grad.nbytes for x in (batch.hidden, batch.weight) if x.grad is not None)
        peak = status_bytes("VmHWM") - before - grads
        prepare(batch, cell.op)
    return peak / MIB


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
