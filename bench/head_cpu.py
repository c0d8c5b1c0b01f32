"""The fused head on a CPU: a DPO step against its three bare GEMMs and against every peer that runs there.

    python -m bench.head_cpu [--quick] [--output results.json]

Protocol: README.md. The full run takes about an hour on two cores (slow peers at V = 128256 take most of it);
`--rounds`, `--impl`, `--dtype` and `--vocab` narrow it down.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import memory
from .harness import (
    Cell,
    Gate,
    Results,
    Row,
    all_right,
    console,
    keep_freed_memory,
    measure,
    over,
    show_gates,
    table,
)  # fmt: skip
from .peers import PEERS, Implementation, Missing, fastpref, fastpref_backends, peer
from .problem import DTYPES, Shape

# 16 sequences of 128 scored tokens, without and with a prompt as long as the response.
SHAPES = [
    Shape(2048, hidden, vocab, prompt_share=share)
    for hidden, vocab in ((512, 32000), (1024, 128256))
    for share in (0.0, 0.5)
]
QUICK = [Shape(64, 64, 4096, pairs=4, prompt_share=share) for share in (0.0, 0.5)]
LIMITS = {"fp32": 1.10, "bf16": 1.20}


def implementations(cell: Cell, names: Sequence[str]) -> tuple[list[Implementation], list[Missing]]:
    """Those that run here, fastpref first, and those that do not."""
    backend = fastpref_backends(torch.device("cpu"), DTYPES[cell.dtype])[0]
    # Without prompts naive_all is naive.
    given = [peer(name, "cpu") for name in names if name != "naive_all" or cell.shape.prompt_share]
    found = [fastpref(backend), *(each for each in given if isinstance(each, Implementation))]
    return found, [each for each in given if isinstance(each, Missing)]


def gates(rows: Sequence[Row]) -> list[Gate]:
    found = []
    timed = [row for row in rows if row.ratio is not None]
    for ours in (row for row in timed if row.impl == "fastpref"):
        where = f"{ours.dtype}, V {ours.V}, {ours.prompt_share:.0%} prompt"
        others = [row for row in timed if row.impl != "fastpref" and _cell(row) == _cell(ours)]
        found.append(Gate(f"step / its three GEMMs, {where}", over(ours.ratio, 1.0), LIMITS[ours.dtype]))
        for row in others:
            times = over(row.ms_median, ours.ms_median)
            found.append(Gate(f"{row.impl} / fastpref, time, {where}", times, 1.0, at_least=True))
        off = abs(over(ours.peak_extra_mib, ours.plan_mib) - 1)
        found.append(Gate(f"memory off its plan, {where}", off, 0.05))
        for naive in (row for row in others if row.impl == "naive" and row.V > 100_000):
            share = over(ours.peak_extra_mib, naive.peak_extra_mib)
            found.append(Gate(f"memory / naive's, {where}", share, 0.2))
    return found


def _cell(row: Row) -> tuple:
    return row.N, row.H, row.V, row.dtype, row.prompt_share


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    peers = [name for name in PEERS if name not in ("naive_compiled", "cce")]
    parser = argparse.ArgumentParser(
        prog="bench.head_cpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast is it")
    parser.add_argument("--output", type=Path, help="JSON, rewritten after every cell")
    parser.add_argument("--rounds", type=int, default=9, help="of each implementation; slow ones take part in 3")
    parser.add_argument("--impl", nargs="*", choices=PEERS, default=peers, help="peers beside fastpref")
    parser.add_argument("--dtype", nargs="*", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--vocab", nargs="*", type=int, help="only the shapes of these vocabularies")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    screen, device = console(), torch.device("cpu")
    results = Results(options.output, device)
    results.environment["freed_memory"] = "kept" if keep_freed_memory() else "returned"
    for shape in QUICK if options.quick else SHAPES:
        if options.vocab and shape.vocab not in options.vocab:
            continue
        for dtype in options.dtype:
            started = time.monotonic()
            cell = Cell(shape, dtype, "step", "dpo")
            running, missing = implementations(cell, options.impl)
            rows = measure(cell, running, device, rounds=options.rounds, say=screen.print)
            for row, implementation in zip(rows, running):
                if row.status == "ok":
                    row.peak_rss_mib = memory.peak_rss_mib(cell, implementation)
            rows += [cell.gap(each.name, "missing", each.why) for each in missing]
            results.add(rows)
            screen.print(table(f"{cell} ({time.monotonic() - started:.0f} s)", rows))
    if not options.quick:
        show_gates(gates(results.rows), screen)
    return results.rows


if __name__ == "__main__":
    sys.exit(not all_right(main()))
