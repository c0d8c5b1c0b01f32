"""The fused head on a GPU against its bare cuBLAS GEMMs and every peer: the benchmark of `make gpu-check`.

    python -m bench.head_gpu [--output results.json] [--seconds 300]

Protocol: README.md. The cells stand in the order of their importance; what `--seconds` does not reach is recorded as
skipped. `--device cpu --tiny` runs the same code over the same cells, shrunk, where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from .harness import Cell, Gate, Results, Row, all_right, console, measure, over, show_gates, table
from .peers import MIB, Implementation, Missing, fastpref, fastpref_backends, peer
from .problem import DTYPES, LOSSES, Shape

# Sequences of 512 scored tokens, no prompts: every row of the input is scored, so nobody pays for padding.
MAIN = Shape(8192, 4096, 128256, pairs=8)  # Llama 3 8B
LARGE = Shape(16384, 4096, 128256, pairs=16)
OTHERS = (
    Shape(8192, 3584, 152064, pairs=8),  # Qwen 2.5 7B
    Shape(8192, 3584, 256000, pairs=8, softcap=30.0),  # Gemma 2 9B
    Shape(16384, 4096, 32000, pairs=16),  # Mistral 7B
    Shape(4096, 4096, 128256, pairs=4),
)
DEFAULT, LARGER, SMALLER = 2048 * MIB, 4096 * MIB, 1024 * MIB
LIMITS = {("step", "fp32"): 1.10, ("step", "bf16"): 1.06, ("frozen", "fp32"): 1.10, ("frozen", "bf16"): 1.06,
          ("forward", "fp32"): 1.05, ("forward", "bf16"): 1.05}  # fmt: skip
ROUNDS, LEAST = 24, 20


class Group(NamedTuple):
    """Contestants of one cell, timed together."""

    shape: Shape
    op: str
    loss: str
    budgets: tuple[int, ...] = (DEFAULT,)
    peers: tuple[str, ...] = ()
    every_backend: bool = False  # else the default one


def groups() -> Iterator[Group]:
    """Most important first, cells of one shape together."""
    every_budget = (DEFAULT, LARGER, SMALLER)
    other_losses = [loss for loss in LOSSES if loss != "dpo"]
    for shape in (MAIN, LARGE):
        yield Group(shape, "step", "dpo", every_budget, ("naive", "trl", "liger"), every_backend=shape is MAIN)
        for op in ("frozen", "forward"):
            yield Group(shape, op, "dpo")
        for loss in other_losses:
            yield Group(shape, "step", loss, (DEFAULT, LARGER))
    for shape in OTHERS:
        yield Group(shape, "step", "dpo", every_budget, ("naive", "trl", "liger"))
        for op in ("frozen", "forward"):
            yield Group(shape, op, "dpo")
    # What compiles for a minute or is known to be far behind.
    for shape in (MAIN, LARGE):
        yield Group(shape, "step", "dpo", (DEFAULT,), ("cce", "torch_lce", "naive_compiled"))
    for shape in (MAIN, LARGE):
        for op in ("frozen", "forward"):
            yield Group(shape, op, "dpo", every_budget, ("naive", "trl", "liger"))
    for shape in OTHERS:
        for loss in other_losses:
            yield Group(shape, "step", loss)


def tiny(group: Group) -> Group:
    """The same group on shapes that a test affords."""
    shape = group.shape
    small = replace(shape, rows=shape.rows // 256, hidden=32, vocab=shape.vocab // 512, pairs=shape.pairs // 4)
    return group._replace(shape=small, budgets=tuple(budget // 2**15 for budget in group.budgets))


def implementations(group: Group, device: torch.device, dtype: torch.dtype) -> Iterator[Implementation | Missing]:
    backends = fastpref_backends(device, dtype)
    for backend in backends if group.every_backend else backends[:1]:
        for budget in group.budgets:
            yield fastpref(backend, budget)
            if device.type == "cuda":  # elsewhere they are the default
                yield fastpref(backend, budget, "bf16")
    for name in group.peers:
        yield peer(name, device.type)


def gates(rows: Sequence[Row]) -> list[Gate]:
    """A ratio is that of the best budget of at most 4 GiB; comparisons with peers are at the default budget."""
    found = []
    timed = [row for row in rows if row.ratio is not None]
    ours = [row for row in timed if row.impl == "fastpref"]
    for cell in dict.fromkeys((row.op, row.loss, row.N, row.H, row.V, row.logits_dtype) for row in ours):
        op, loss, n, h, v, logits = cell
        where = f"{loss} {op}, N {n}, H {h}, V {v}, {logits} logits"
        here = [row for row in ours if (row.op, row.loss, row.N, row.H, row.V, row.logits_dtype) == cell]
        if n >= MAIN.rows:
            gemms = {"step": "three GEMMs", "frozen": "two GEMMs", "forward": "its GEMM"}[op]
            best = min(over(row.ratio, 1.0) for row in here)
            found.append(Gate(f"{where}: time / {gemms}", best, LIMITS[op, logits]))
        off = max(abs(over(row.peak_extra_mib, row.plan_mib) - 1) for row in here)
        found.append(Gate(f"{where}: memory off its plan", off, 0.02))
        if logits != "fp32":
            continue
        error = max(over(row.logp_max_err, 1.0) for row in here)
        found.append(Gate(f"{where}: log-prob error, nats a token", error, 1e-4))
        default = next((row for row in here if row.budget_mib == DEFAULT / MIB), None)
        if default is None or op != "step":
            continue
        for peer_row in timed:
            if (peer_row.op, peer_row.loss, peer_row.N, peer_row.H, peer_row.V) != cell[:-1]:
                continue
            if peer_row.impl in ("trl", "liger"):
                times, least = over(peer_row.ratio, default.ratio), {"trl": 2.0, "liger": 1.3}[peer_row.impl]
                found.append(Gate(f"{where}: {peer_row.impl} / fastpref, time", times, least, at_least=True))
            if peer_row.impl == "liger":
                share = over(default.peak_extra_mib, peer_row.peak_extra_mib)
                found.append(Gate(f"{where}: memory / Liger's", share, 0.25))
    return found


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        prog="bench.head_gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON, rewritten after every cell")
    parser.add_argument("--seconds", type=float, default=300.0, help="no cell begins after them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shrunk shapes, 2 rounds: does it run")
    options = parser.parse_args(arguments)
    device, screen = torch.device(options.device), console()
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here (--device cpu --tiny runs the same code on a CPU)")
    deadline = time.monotonic() + options.seconds
    results = Results(options.output, device)
    for group in groups():
        if options.tiny:
            group = tiny(group)
        cell = Cell(group.shape, "bf16", group.op, group.loss)
        given = list(implementations(group, device, DTYPES[cell.dtype]))
        rows = [cell.gap(each.name, "missing", each.why) for each in given if isinstance(each, Missing)]
        running = [each for each in given if isinstance(each, Implementation)]
        if time.monotonic() > deadline:
            skipped = [cell.row(each, device.type) for each in running]
            for row in skipped:
                row.status, row.note = "skipped", "time budget"
            rows = skipped + rows
            screen.print(f"{cell}: skipped, time budget")
        else:
            rounds, least = (2, 2) if options.tiny else (ROUNDS, LEAST)
            measured = measure(
                cell, running, device, rounds=rounds, least=least, deadline=deadline, say=screen.print
            )
            rows = measured + rows
            screen.print(table(str(cell), rows))
        results.add(rows)
    show_gates(gates(results.rows), screen)
    left_out = [row for row in results.rows if row.status == "skipped"]
    if left_out:
        screen.print(f"{len(left_out)} measurements skipped for time; --seconds allows more")
    return results.rows


if __name__ == "__main__":
    sys.exit(not all_right(main()))
