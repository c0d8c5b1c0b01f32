"""Cost of the fused head as work grows: one size at a time, at a fixed budget.

    fastpref bench sweep rows       N from 1k to 1M scored rows: run as far as memory goes, planned beyond
    fastpref bench sweep vocab      V from 32k to 512k
    fastpref bench sweep length     one pair, ever longer: memory must stay flat
    fastpref bench sweep pairs      ever more pairs of one length
    fastpref bench sweep ranks      ever more ranks with a part of the vocabulary each (ranks.py has its options)

Protocol: bench/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from . import command, ranks
from .gates import Gate, over, show_gates
from .harness import GEMM_BYTES, Cell, all_right, free_bytes
from .head import Group, add_arguments, chosen_groups, run_groups
from .peers import Implementation
from .presets import PRESETS
from .problem import DTYPES, Shape
from .records import Row

PAIR_LENGTH = 128  # scored tokens of a response where pairs are swept
FLAT = 1.05  # memory of a pair twice as long


def swept(what: str, base: Shape, quick: bool) -> list[Shape]:
    """Shapes in the order of their size; `base` gives what is not swept."""
    steps = 3 if quick else {"rows": 11, "vocab": 5, "length": 9, "pairs": 9}[what]
    first = {"rows": 64, "vocab": 1024, "length": 32} if quick else {"rows": 1024, "vocab": 32768, "length": 128}
    if what == "rows":
        return [replace(base, rows=first["rows"] << i) for i in range(steps)]
    if what == "vocab":
        return [replace(base, vocab=first["vocab"] << i) for i in range(steps)]
    if what == "length":
        return [replace(base, rows=2 * first["length"] << i) for i in range(steps)]
    length = 8 if quick else PAIR_LENGTH
    return [replace(base, pairs=1 << i, rows=2 * length << i) for i in range(steps)]


def bytes_needed(cell: Cell, plan_bytes: int) -> int:
    """Roughly, of a cell with fastpref alone: inputs and gradients, the making of both, the GEMMs' buffers."""
    shape, size = cell.shape, DTYPES[cell.dtype].itemsize
    n, h, v = shape.rows, shape.hidden, shape.vocab
    padded = round(n / (1 - shape.prompt_share))
    inputs = 2 * size * h * (padded + v)
    making = 4 * h * (4 * padded + v)
    running = 2 * min(n * v * size, GEMM_BYTES) + size * h * (n + v) + plan_bytes + 3 * 8 * min(n, 16384) * 8192
    return inputs + max(making, running)


def split_by_memory(
    groups: Sequence[Group], device: torch.device
) -> tuple[list[Group], list[Row]]:
    """What is run, and rows of what is only planned: those beyond nine tenths of the memory that is free."""
    free = free_bytes(device)
    fitting, planned = [], []
    for group in groups:
        rows = [
            group.cell.row(each, device.type)
            for each in group._replace(peers=()).contestants(device)
            if isinstance(each, Implementation)
        ]
        needed = max((bytes_needed(group.cell, int((row.plan_mib or 0) * 2**20)) for row in rows), default=0)
        if free is None or needed <= 0.9 * free:
            fitting.append(group)
            continue
        for row in rows:
            if row.status == "ok":
                row.status, row.note = "planned", f"a run takes about {needed / 2**30:.0f} GiB"
        planned += rows
    return fitting, planned


def gates(what: str, rows: Sequence[Row]) -> list[Gate]:
    """length: the longest pair's memory over that of one half as long."""
    found = []
    if what == "length":
        ours = [row for row in rows if row.impl == "fastpref" and row.peak_extra_mib is not None]
        kinds = dict.fromkeys((row.dtype, row.logits_dtype, row.budget_mib, row.V, row.op) for row in ours)
        for kind in kinds:
            cells = sorted(
                (row for row in ours if (row.dtype, row.logits_dtype, row.budget_mib, row.V, row.op) == kind),
                key=lambda row: row.N,
            )
            if len(cells) > 1:
                long, half = cells[-1], cells[-2]
                where = f"{long.dtype}, V {long.V}, {long.budget_mib:g} MiB"
                growth = over(long.peak_extra_mib, half.peak_extra_mib)
                found.append(Gate(f"memory at {long.N} rows / at {half.N}, {where}", growth, FLAT))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("sweep", __doc__ or "")
    parser.add_argument("what", choices=("rows", "vocab", "length", "pairs", "ranks"))
    add_arguments(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["ranks"]:
        return ranks.main(given[1:])
    options = parser.parse_args(given)
    options.impl = options.impl or ["fastpref", "naive", "torch_lce", "liger"]
    if options.what == "length":
        if options.pairs:
            raise ValueError("--pairs: one pair grows in length; --rows are those of both its responses")
        options.pairs = [1]
    with command.session(options, f"sweep-{options.what}", Row) as run:
        base = PRESETS["cpu-small" if run.device.type == "cpu" else "llama3-8b"].shape
        given = command.shapes(options, [base])
        taken = {"rows": "rows", "vocab": "vocab", "length": "rows", "pairs": "pairs"}[options.what]
        shapes = given if getattr(options, taken) else [
            shape for each in given for shape in swept(options.what, each, options.quick)
        ]
        groups = [
            group._replace(cell=group.cell._replace(benchmark=f"sweep-{options.what}"))
            for group in chosen_groups(options, run.device, shapes)
        ]
        fitting, planned = split_by_memory(groups, run.device)
        run.results.add(row for row in planned if not run.results.has(row))
        run_groups(fitting, run)
        for row in planned:
            run.say(
                f"planned only: N {row.N}, V {row.V}, {row.dtype}: {row.plan_mib or 0:.0f} MiB beyond inputs and "
                f"gradients in {row.gemms or 0:.3g} GEMMs ({row.note})"
            )
        if not options.quick and (found := gates(options.what, run.results.rows)):
            show_gates(found, run.screen)
        command.finish(run)
    return int(not all_right(run.results.rows))
