"""What the head and a training step must reach, as ratios: to bare GEMMs and to peers of the same run, to the own plan,
and to the card that the run stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fastpref.plan import DEFAULT_BUDGET, H200, Problem, plan
from fastpref.train.memory_estimate import CONTEXT

from .peers import MIB
from .presets import PRESETS
from .records import Row


class Gate(NamedTuple):
    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def over(a: float | None, b: float | None) -> float:
    """a / b; NaN, which passes no gate, where one of them was not measured."""
    return math.nan if a is None or not b else a / b


def show_gates(gates: Sequence[Gate], screen: Console) -> None:
    found = Table(title="Gates", title_justify="left")
    for name in ("gate", "measured", "wanted", ""):
        found.add_column(name)
    for gate in gates:
        wanted = f"{'>=' if gate.at_least else '<='} {gate.limit:g}"
        found.add_row(gate.what, f"{gate.value:.3g}", wanted, "[green]pass" if gate.passed else "[red]FAIL")
    screen.print(found)
    screen.print(f"{sum(gate.passed for gate in gates)} of {len(gates)} gates pass")


CPU_LIMITS = {"fp32": 1.10, "bf16": 1.20}


def on_cpu(rows: Sequence[Row]) -> list[Gate]:
    found = []
    timed = [row for row in rows if row.ratio is not None]
    for ours in (row for row in timed if row.impl == "fastpref"):
        where = f"{ours.dtype}, V {ours.V}, {ours.prompt_share:.0%} prompt"
        others = [row for row in timed if row.impl != "fastpref" and _cell(row) == _cell(ours)]
        found.append(Gate(f"step / its three GEMMs, {where}", over(ours.ratio, 1.0), CPU_LIMITS[ours.dtype]))
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


SLACK = 0.02  # of the GEMMs' time: launches, the ends of waves, what one pass leaves of the copy rate


def gpu_limit(op: str, logits: str, n: int, h: int, v: int, budget_mib: float | None, ms_limit: float | None,
              bytes_per_s: float = H200[1]) -> float:
    """What bytes and FLOPs allow: at the rate of the bare GEMMs of the same rounds, and of a copy of the same run."""
    problem = Problem((n // 32,) * 32, h, v, 2, 4 if logits == "fp32" else 2, 2, needs_hidden_grad=op != "forward",
                      needs_weight_grad=op == "step", device="cuda")
    least = {"step": 3, "frozen": 2, "forward": 1}[op]
    flops_per_s = H200[0] if ms_limit is None else least * 2 * n * h * v / (ms_limit / 1e3)
    return plan(problem, None if budget_mib is None else int(budget_mib * MIB)).over_gemms(flops_per_s, bytes_per_s)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of copies of 1 GiB: the best of five."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(6):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        target.copy_(source)
        marks[1].record()
        marks[1].synchronize()
        times.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return 2 * 2**30 / min(times)


LEAST_ROWS = PRESETS["llama3-8b"].shape.rows  # with fewer the GEMMs themselves are not at their best


def on_gpu(rows: Sequence[Row], bytes_per_s: float = H200[1]) -> list[Gate]:
    """A ratio is that of the best budget of at most 4 GiB; comparisons with peers are at the default budget."""
    found = []
    timed = [row for row in rows if row.ratio is not None]
    ours = [row for row in timed if row.impl == "fastpref"]
    for cell in dict.fromkeys((row.op, row.loss, row.N, row.H, row.V, row.logits_dtype) for row in ours):
        op, loss, n, h, v, logits = cell
        where = f"{loss} {op}, N {n}, H {h}, V {v}, {logits} logits"
        here = [row for row in ours if (row.op, row.loss, row.N, row.H, row.V, row.logits_dtype) == cell]
        if n >= LEAST_ROWS:
            gemms = {"step": "three GEMMs", "frozen": "two GEMMs", "forward": "its GEMM"}[op]
            best = min(here, key=lambda row: over(row.ratio, 1.0))
            allowed = gpu_limit(op, logits, n, h, v, best.budget_mib, best.ms_limit, bytes_per_s) + SLACK
            found.append(Gate(f"{where}: time / {gemms}", over(best.ratio, 1.0), allowed))
        off = max(abs(over(row.peak_extra_mib, row.plan_mib) - 1) for row in here)
        found.append(Gate(f"{where}: memory off its plan", off, 0.02))
        if logits != "fp32":
            continue
        error = max(over(row.logp_max_err, 1.0) for row in here)
        found.append(Gate(f"{where}: log-prob error, nats a token", error, 1e-4))
        default = next((row for row in here if row.budget_mib == DEFAULT_BUDGET["cuda"] / MIB), None)
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


def of_training(rows: Sequence[Any]) -> list[Gate]:
    """Of `bench train`: within the card, as planned, faster than what pads. Of cells that were begun."""
    found = []
    for ours in (row for row in rows if row.impl == "fastpref" and row.status not in ("skipped", "missing")):
        where = f"{ours.cell}, checkpointing {ours.checkpointing}"
        if ours.card_gb:
            taken = None if ours.ms_median is None else ours.reserved_mib * MIB + CONTEXT
            found.append(Gate(f"{where}: memory / {ours.card_gb:g} GB", over(taken, ours.card_gb * 1e9), 1.0))
            off = abs(over(ours.ms_median and ours.peak_mib, ours.plan_mib) - 1)
            found.append(Gate(f"{where}: peak off its plan", off, 0.05))
        for peer in (row for row in rows if same_setting(row, ours) and row.impl in ("trl", "naive")):
            if peer.status == "ok":
                times = over(ours.pairs_per_s, peer.pairs_per_s)
                found.append(Gate(f"{where}: pairs/s / {peer.impl}'s", times, 1.5, at_least=True))
    return found


def same_setting(a: Any, b: Any) -> bool:
    """Of `bench train`: the same cell, and the same activation checkpointing."""
    return (a.cell, a.checkpointing) == (b.cell, b.checkpointing)
