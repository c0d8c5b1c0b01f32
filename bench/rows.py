"""Row kernels: the share they reach of what copying the same bytes takes.

    fastpref bench rows [--vocab 32000 128256] [--rows 1024] [--dtype bf16] [--backend native reference]

A sweep that reads b bytes of logits and writes c of residuals is compared with a plain `copy_` that reads and writes
(b + c) / 2, in the same round. Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import fastpref
from fastpref import rows as row_kernels
from fastpref.rows import FoldState, RowStats, Tile, Transform, fold_finish

from . import command
from .harness import Contestant, all_right, clock_under, fill_times, l2_flush, time_interleaved, told
from .presets import PRESETS, QUICK
from .problem import DTYPES, IGNORE, LOGITS_STD, relative
from .records import Row

# op: (bytes read, bytes written) of a logit, by bytes of a logit and of a residual
OPS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "residual": lambda logit, residual: (logit, residual),  # into a stash of its own
    "in_place": lambda logit, residual: (logit, logit),  # over the logits
    "forward": lambda logit, residual: (logit, 0),  # log-probs only
    "entropy": lambda logit, residual: (logit, residual),  # `residual` with every extra
    "fold": lambda logit, residual: (logit, 0),
    "residual_given_lse": lambda logit, residual: (logit, residual),
}
CHECKED = 16  # rows


@dataclass
class KernelRow(Row):
    """N: rows of the tile. H, loss and pairs mean nothing. dtype: of the residuals."""

    l2: str = ""  # GPU: "hot": as the same call before it left it; "cold": flushed
    gb_per_s: float | None = None  # read and written
    u_rel_err: float | None = None  # relative Frobenius norm of the residuals


class TileShape(NamedTuple):
    rows: int
    vocab: int
    softcap: float | None


def make_tile(
    shape: TileShape, logits: torch.dtype, residuals: torch.dtype, device: torch.device
) -> tuple[Tile, Tensor]:
    """A tile over the whole vocabulary, and the stash for its residuals."""
    gen = torch.Generator(device=device).manual_seed(0)
    values = torch.randn(shape.rows, shape.vocab, generator=gen, device=device).mul_(LOGITS_STD).to(logits)
    targets = torch.randint(0, shape.vocab, (shape.rows,), generator=gen, device=device)
    return Tile(values, targets, Transform(softcap=shape.softcap)), torch.empty_like(values, dtype=residuals)


class Sweep:
    """One kernel over one tile, in place over a copy of it."""

    def __init__(self, backend: str, op: str, tile: Tile, stash: Tensor) -> None:
        self.kernels = row_kernels.choose(backend, tile.logits.device, stash.dtype)
        self.op, self.tile, self.stash = op, tile, stash
        self.work = tile.logits.clone() if op == "in_place" else tile.logits
        if op == "residual_given_lse":
            state = self.fold()
            _, self.lse = fold_finish(state, tile.targets, IGNORE)

    def before(self) -> None:
        if self.op == "in_place":
            self.work.copy_(self.tile.logits)

    def warm(self) -> None:
        """L2 as a call leaves it; in place, the logits put back are."""
        if self.op != "in_place":
            self()

    def fold(self) -> FoldState:
        tile = self.tile
        state = FoldState.new(
            len(tile.targets), dtype=row_kernels.stats_dtype(tile.logits.dtype), device=tile.logits.device
        )
        self.kernels.fold(tile, state)
        return state

    def __call__(self) -> RowStats | FoldState | None:
        tile = self.tile
        if self.op == "fold":
            return self.fold()
        if self.op == "residual_given_lse":
            return self.kernels.residual_given_lse(tile, self.lse, self.stash)
        out = {"forward": None, "in_place": self.work}.get(self.op, self.stash)
        extras = row_kernels.EXTRAS if self.op == "entropy" else ()
        return self.kernels.residual(tile._replace(logits=self.work), out, extras)

    def check(self, row: KernelRow) -> None:
        """Runs it once and compares a few rows with fp64."""
        tile = self.tile
        self.before()
        found = self()
        some = torch.linspace(0, len(tile.targets) - 1, CHECKED, device=tile.logits.device).round().long().unique()
        u = tile.logits[some].double()
        cap = tile.transform.softcap
        z = u if cap is None else cap * torch.tanh(u / cap)
        lse, targets = z.logsumexp(1), tile.targets[some]
        wrong, scale = [], None
        if found is not None:
            logp = found.logp if isinstance(found, RowStats) else fold_finish(found, tile.targets, IGNORE)[0]
            expected = z.gather(1, targets[:, None])[:, 0] - lse
            row.logp_max_err, row.logp_err_of = float((logp[some].double() - expected).abs().max()), "token"
            if not row.logp_max_err <= 1e-3:
                wrong.append(f"log-probs off by {row.logp_max_err:.2g} nats a token")
            scale = found.scale if isinstance(found, RowStats) else None
        if self.op not in ("forward", "fold"):
            residuals = -(z - lse[:, None]).exp()
            residuals[torch.arange(len(some), device=z.device), targets] += 1
            if cap is not None:
                residuals *= 1 - (z / cap).square()
            out = (self.work if self.op == "in_place" else self.stash)[some].double()
            row.u_rel_err = relative(out if scale is None else out * scale[some, None].double(), residuals)
            if not row.u_rel_err <= (1e-4 if self.stash.dtype == torch.float32 else 2e-2):
                wrong.append(f"residuals off by {row.u_rel_err:.2g}")
        if wrong:
            row.status, row.note = "wrong", "; ".join(wrong)


class Cell(NamedTuple):
    """An op on a tile, its limit and its contestants."""

    shape: TileShape
    logits_dtype: str
    dtype: str
    op: str
    l2: str

    def row(self, backend: str) -> KernelRow:
        shape = self.shape
        return KernelRow(
            "fastpref", self.op, "", shape.rows, 0, shape.vocab, self.dtype, version=fastpref.__version__,
            backend=backend, logits_dtype=self.logits_dtype, softcap=shape.softcap, benchmark="rows", l2=self.l2,
        )

    def __str__(self) -> str:
        shape, l2 = self.shape, f", {self.l2} L2" if self.l2 else ""
        cap = f", softcap {shape.softcap:g}" if shape.softcap else ""
        return f"{self.op}, {self.logits_dtype} to {self.dtype}, {shape.rows} rows, V {shape.vocab}{cap}{l2}"


def measure(cell: Cell, backends: Sequence[str], run: command.Session) -> list[KernelRow]:
    rows, device = [cell.row(backend) for backend in backends], run.device
    try:
        tile, stash = make_tile(cell.shape, DTYPES[cell.logits_dtype], DTYPES[cell.dtype], device)
        moved = sum(OPS[cell.op](tile.logits.itemsize, stash.itemsize)) * tile.logits.numel()
        source = torch.zeros(moved // 8, dtype=torch.float32, device=device)
        copied = torch.empty_like(source)
        flush = l2_flush(device) if cell.l2 == "cold" else None
    except Exception as error:
        for row in rows:
            row.status, row.note = told(error)
        return rows
    def copy() -> None:
        copied.copy_(source)

    def before(*calls: Callable[[], None]) -> None:
        for call in calls:
            call()

    contestants, running = [Contestant(flush or (copy if cell.l2 else before), copy)], []
    for row, backend in zip(rows, backends):
        try:
            sweep = Sweep(backend, cell.op, tile, stash)
            sweep.check(row)
        except Exception as error:
            row.status, row.note = told(error)
        if row.status == "ok":
            running.append(row)
            cache = [flush] if flush else [sweep.warm] if cell.l2 else []
            contestants.append(Contestant(partial(before, sweep.before, *cache), sweep))
    copy_times, *times = time_interleaved(
        contestants, run.rounds, device, slow=[False] * len(contestants), deadline=run.deadline, least=run.least
    )
    clock = clock_under(copy, device)
    for row, of_one in zip(running, times):
        fill_times(row, of_one, copy_times)
        row.clock_mhz = clock
        if row.ms_median:
            row.gb_per_s = moved / row.ms_median / 1e6
    return rows


def table(title: str, rows: Sequence[KernelRow]) -> Table:
    found = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("", "ms", "p10-p90", "GB/s", "share of copy", "logp err", "U err"):
        found.add_column(name, justify="right" if name else "left")
    gaps = []
    for row in rows:
        name = str(row.backend)
        if row.ms_median is None:
            gaps.append(f"{name}: {row.status}: {row.note}")
            continue
        errors = ("" if error is None else f"{error:.1e}" for error in (row.logp_max_err, row.u_rel_err))
        found.add_row(
            name, f"{row.ms_median:.3f}", f"{row.ms_p10:.3f}-{row.ms_p90:.3f}", f"{row.gb_per_s:.1f}",
            f"{100 / (row.ratio or 1):.0f} %", *errors,
        )
    timed = next((row.ms_limit for row in rows if row.ms_limit is not None), None)
    if timed is not None:
        found.add_row("copy_ of as many bytes", f"{timed:.3f}", "", "", "100 %")
    found.caption = "\n".join(gaps)
    return found


def cells(options: argparse.Namespace, device: torch.device, shapes: Sequence[TileShape]) -> list[Cell]:
    """Logits of the dtypes that the head makes there: fp32 and the inputs' own on a GPU, the inputs' own on a CPU."""
    found = []
    for shape in shapes:
        for dtype in options.dtype or (["bf16"] if device.type == "cuda" else ["fp32", "bf16"]):
            for logits in dict.fromkeys(("fp32", dtype) if device.type == "cuda" else (dtype,)):
                for op in options.op:
                    for l2 in ("hot", "cold") if device.type == "cuda" else ("",):
                        found.append(Cell(shape, logits, dtype, op, l2))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("rows", __doc__ or "")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--rows", nargs="+", type=command.positive, help="of the tile; default: 256, GPU 1024")
    parser.add_argument("--vocab", nargs="+", type=command.positive, help="in place of the presets'")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of residuals; default: bf16, on a CPU fp32 too")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    parser.add_argument("--backend", nargs="+", choices=row_kernels.BACKENDS, help="default: all that work here")
    options = parser.parse_args(arguments)
    with command.session(options, "rows", KernelRow) as run:
        names = options.preset or (["cpu-small"] if run.device.type == "cpu" else ["llama3-8b", "gemma2-9b"])
        bases = [QUICK.shape] if options.quick else [PRESETS[name].shape for name in names]
        shapes = [
            TileShape(rows, vocab, base.softcap)
            for base in bases
            for vocab in options.vocab or (base.vocab,)
            for rows in options.rows or (64 if options.quick else 1024 if run.device.type == "cuda" else 256,)
        ]
        todo = cells(options, run.device, shapes)
        for number, cell in enumerate(todo, 1):
            given = options.backend or [
                name
                for name in row_kernels.BACKENDS
                if row_kernels.availability(name).available and _takes(name, run.device, cell.dtype)
            ]
            backends = [name for name in given if not run.results.has(cell.row(name))]
            run.progress(number, len(todo), cell if backends else f"{cell}: nothing left to do")
            if run.out_of_time or not backends:
                rows = [cell.row(name) for name in backends]
                for row in rows:
                    row.status, row.note = "skipped", "time budget"
            else:
                started = time.monotonic()
                rows = measure(cell, backends, run)
                run.screen.print(table(f"{cell} ({time.monotonic() - started:.1f} s)", rows))
            run.results.add(rows)
        command.finish(run)
    return int(not all_right(run.results.rows))


def _takes(backend: str, device: torch.device, dtype: str) -> bool:
    try:
        row_kernels.choose(backend, device, DTYPES[dtype])
    except ValueError:
        return False
    return True
