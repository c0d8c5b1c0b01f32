"""The head with its vocabulary sharded over ranks, at a fixed global batch: time, memory and traffic of a rank.

    fastpref bench sweep ranks [--ranks 1 2 4] [--rows 2048] [--hidden 1024] [--vocab 128256]

    fastpref    W stays sharded: hidden rows and a few numbers a row travel (fastpref/sharded.py)
    gathered    what FSDP does for an LM head: W is gathered, every rank runs its own rows, dW is reduced to the shards

Each rank has its share of the pairs and of the rows of W. The limit: the bare GEMMs of a rank's share of the columns,
into buffers that exist, on all ranks at once. All of them start a call together and the slowest counts. Ranks are
processes: on CPUs gloo, and the threads are shared out, so that several ranks on one machine show memory and traffic,
not speed; on GPUs one each, NCCL. Both are checked against fp64 first. Protocol: bench/README.md.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import fastpref as fp

from . import command
from .harness import (
    GRAD_TOLERANCE,
    LOGP_TOLERANCE,
    Contestant,
    fill_times,
    keep_freed_memory,
    time_interleaved,
    told,
    watched,
)
from .peers import MIB, fastpref_loss
from .presets import PRESETS
from .problem import DTYPES, Batch, Shape, Truth, make_batch, relative
from .records import Row

WAYS = ("fastpref", "gathered")


@dataclass
class RanksRow(Row):
    """ratio: to the bare GEMMs of one rank's share. peak_extra_mib: of the rank that needs most."""

    ranks: int = 1
    sent_mib: float | None = None  # by one rank in a step, at the least a ring algorithm can do


class Part:
    """What one rank has of the batch and of W, and the two ways to a step."""

    def __init__(
        self, whole: Batch, rank: int, ranks: int, device: torch.device, loss: str, budget: int | None
    ) -> None:
        shape, self.ranks, self.loss, self.budget = whole.shape, ranks, fastpref_loss(loss), budget
        pairs = range(rank * shape.pairs // ranks, (rank + 1) * shape.pairs // ranks)
        self.sequences = [*pairs, *(shape.pairs + i for i in pairs)]
        self.hidden = whole.hidden[self.sequences].contiguous()
        self.targets, self.ref_logps = whole.targets[self.sequences], whole.ref_logps[self.sequences]
        self.totals = fp.Totals(shape.sequences, shape.rows, shape.rows // 2)
        self.mesh = init_device_mesh(device.type, (ranks,))
        each = -(-shape.vocab // ranks)
        self.columns = slice(min(rank * each, shape.vocab), min((rank + 1) * each, shape.vocab))
        local = whole.weight[self.columns].clone()
        self.weight = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=whole.weight.shape, stride=whole.weight.stride()
        ).requires_grad_()
        self.each = each

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None
        self.hidden.requires_grad_()
        dist.barrier()

    def fastpref(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = self._run(self.hidden, self.weight)
        assert self.hidden.grad is not None and self.weight.grad is not None
        dw: Any = self.weight.grad
        return out.loss.detach(), out.logps, self.hidden.grad, dw.to_local()

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = self.weight.to_local().detach()
        vocab, width = self.weight.shape
        filled = torch.cat((local, local.new_zeros(self.each - len(local), width)))
        whole = local.new_empty(self.each * self.ranks, width)
        _all_gather(whole, filled)
        weight = whole[:vocab].requires_grad_()
        out = self._run(self.hidden, weight)
        assert self.hidden.grad is not None and weight.grad is not None
        dw = local.new_zeros(self.each * self.ranks, width)
        dw[:vocab] = weight.grad
        own = torch.empty_like(filled)
        _reduce_scatter(own, dw)
        return out.loss.detach(), out.logps, self.hidden.grad, own[: len(local)]

    def _run(self, hidden: Tensor, weight: Tensor) -> fp.PreferenceOutput:
        out = fp.linear_preference_loss(
            hidden, weight, self.targets, loss=self.loss, ref_logps=self.ref_logps, totals=self.totals,
            memory_budget=self.budget,
        )
        out.loss.backward()
        return out

    def gemms(self) -> Callable[[], None]:
        """Of all rows and this rank's columns, into buffers that exist."""
        count = int(self.totals.tokens)
        x = self.hidden.detach().flatten(0, 1)
        x = x.repeat(-(-count // len(x)), 1)[:count].contiguous()
        w = self.weight.to_local().detach()
        z, dx, dw = x.new_empty(count, len(w)), torch.empty_like(x), torch.empty_like(w)
        torch.mm(x, w.t(), out=z)
        u = torch.softmax(z.float(), 1).neg_().to(z.dtype)

        def run() -> None:
            torch.mm(x, w.t(), out=z)
            torch.mm(u, w, out=dx)
            torch.mm(u.t(), x, out=dw)

        return run


def _all_gather(out: Tensor, x: Tensor) -> None:
    # the newer name came with torch 2.13, the older one warns since
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, x)


def _reduce_scatter(out: Tensor, x: Tensor) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(out, x)


def sent_mib(way: str, shape: Shape, dtype: torch.dtype, ranks: int) -> float:
    """A ring all-gather or reduce-scatter of B bytes sends (R - 1) / R of them from each rank."""
    size, n = dtype.itemsize, shape.rows
    if way == "gathered":
        moved = 2 * size * shape.vocab * shape.hidden
    else:  # hidden rows there, dX back in fp32; targets, maximum, sum and target logit of each row, its gradient
        moved = (size + 4) * n * shape.hidden + 8 * n + 2 * 4 * n + 2 * 4 * n + 2 * 4 * n + 4 * n
    return (ranks - 1) / ranks * moved / MIB


def check(part: Part, way: str, expected: Any, truth: Truth, row: RanksRow) -> float:
    """Runs it once: errors of loss, log-probs and gradients against fp64, of the worst rank. Returns peak bytes."""
    part.clear()
    seen = watched(getattr(part, way), part.hidden.device)
    loss, logps, dx, dw = seen.result
    dist.all_reduce(loss)
    errors = torch.zeros(3, dtype=torch.float64, device=loss.device)
    errors[0] = (logps.double() - truth.logps[part.sequences]).abs().max() / (row.N / len(truth.logps))
    here = {sequence: place for place, sequence in enumerate(part.sequences)}
    length = part.hidden.shape[1]
    picked = [(i, int(at)) for i, at in enumerate(truth.batch.index[truth.rows].tolist()) if at // length in here]
    if picked:
        own = torch.tensor([here[at // length] * length + at % length for _, at in picked], device=dx.device)
        errors[1] = relative(dx.flatten(0, 1)[own], expected.hidden[[i for i, _ in picked]])
    inside = [(i, int(v)) for i, v in enumerate(truth.vocab.tolist()) if part.columns.start <= v < part.columns.stop]
    if inside:
        own = torch.tensor([v - part.columns.start for _, v in inside], device=dw.device)
        errors[2] = relative(dw[own], expected.weight[[i for i, _ in inside]])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    row.logp_max_err, row.dx_rel_err, row.dw_rel_err = errors.tolist()
    row.logp_err_of = "sequence"
    row.loss_err = abs(float(loss) - float(expected.loss))
    dtype = DTYPES[row.dtype]
    gradients = max(row.dx_rel_err, row.dw_rel_err)
    off = row.logp_max_err * row.N / len(truth.logps)  # as harness.check: the loss may be off by what its log-probs are
    loss_limit = 1e-3 * (1 + abs(float(expected.loss))) + 2 * off * float(expected.logps.abs().sum())
    right = row.logp_max_err <= LOGP_TOLERANCE[dtype] and gradients <= GRAD_TOLERANCE[dtype]
    if not (right and row.loss_err <= loss_limit):
        row.status = "wrong"
        row.note = f"log-probs off by {row.logp_max_err:.2g}, loss by {row.loss_err:.2g}, gradients by {gradients:.2g}"
    return float(seen.extra_bytes)


def _rank(rank: int, ranks: int, rows: Sequence[RanksRow], shape: Shape, kind: str, threads: int, rounds: int,
          folder: str) -> None:
    """One process: fills the rows; the first writes them to a file in `folder`."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        torch.set_num_threads(max(1, threads // ranks))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    try:
        whole = make_batch(shape, DTYPES[rows[0].dtype], device)
        truth = Truth(whole)
        expected = truth.gradients(rows[0].loss, whole)
        budget = None if rows[0].budget_mib is None else round(rows[0].budget_mib * MIB)
        part = Part(whole, rank, ranks, device, rows[0].loss, budget)
        for row in rows:
            check(part, row.impl, expected, truth, row)  # the first call compiles and loads things
            peak = torch.tensor(check(part, row.impl, expected, truth, row), device=device)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            row.peak_extra_mib = float(peak) / MIB

        def together(call: Callable[[], object]) -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.barrier()

        running = [row for row in rows if row.status == "ok"]
        contestants = [Contestant(part.clear, partial(together, part.gemms()))]
        contestants += [Contestant(part.clear, partial(together, getattr(part, row.impl))) for row in running]
        limit, *times = time_interleaved(contestants, rounds, torch.device("cpu"))  # wall clock: of all ranks together
        for row, of_one in zip(running, times):
            fill_times(row, of_one, limit)
        if rank == 0:
            torch.save([asdict(row) for row in rows], f"{folder}/rows")
    finally:
        dist.destroy_process_group()


def measure(rows: list[RanksRow], shape: Shape, run: command.Session) -> list[RanksRow]:
    """Of one number of ranks."""
    ranks = rows[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        try:
            processes.spawn(
                _rank,
                (ranks, rows, shape, run.device.type, torch.get_num_threads(), run.rounds, folder),
                nprocs=ranks,
            )
        except Exception as error:
            for row in rows:
                row.status, row.note = told(error)
            return rows
        found = torch.load(Path(folder, "rows"), weights_only=True)
    known = {field.name for field in fields(RanksRow)}
    return [RanksRow(**{name: value for name, value in row.items() if name in known}) for row in found]


def table(title: str, rows: Sequence[RanksRow]) -> Table:
    found = Table(title=title, title_justify="left", caption_justify="left")
    columns = ("ranks", "ms", "p10-p90", "x own GEMMs", "extra MiB a rank", "sent MiB a rank", "dX err", "dW err")
    for name in ("", *columns):
        found.add_column(name, justify="right" if name else "left")
    for row in rows:
        if row.ms_median is None:
            found.add_row(row.impl, str(row.ranks), f"{row.status}: {row.note}")
            continue
        found.add_row(
            row.impl, str(row.ranks), f"{row.ms_median:.1f}", f"{row.ms_p10:.1f}-{row.ms_p90:.1f}", f"{row.ratio:.2f}",
            f"{row.peak_extra_mib:.0f}", f"{row.sent_mib:.0f}", f"{row.dx_rel_err:.1e}", f"{row.dw_rel_err:.1e}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("sweep ranks", __doc__ or "")
    command.add_shapes(parser)
    command.add_budgets(parser)
    parser.add_argument("--ranks", nargs="+", type=command.positive, help="default: 1 2 4, on GPUs up to their number")
    options = parser.parse_args(arguments)
    with command.session(options, "sweep-ranks", RanksRow) as run:
        cuda = run.device.type == "cuda"
        most = torch.cuda.device_count() if cuda else math.inf
        asked = options.ranks or [1, 2, 4]
        if options.ranks and max(asked) > most:
            raise ValueError(f"--ranks is {max(asked)}; there are {most} GPUs here, and each rank takes one")
        shapes = command.shapes(options, [PRESETS["llama3-8b" if cuda else "cpu-small"].shape])
        for shape in shapes:
            if shape.pairs < max(asked):
                raise ValueError(f"--pairs is {shape.pairs}; it takes at least one a rank ({max(asked)})")
        ways = [name for name in WAYS if not options.impl or name in options.impl]
        cells = [
            (shape, dtype, budget, ranks)
            for shape in shapes
            for dtype in options.dtype or ["bf16" if cuda else "fp32"]
            for budget in command.budgets(options)
            for ranks in asked
            if ranks <= most
        ]
        for number, (shape, dtype, budget, ranks) in enumerate(cells, 1):
            run.progress(number, len(cells), f"{ranks} ranks, {dtype}, {shape}")
            rows = [
                RanksRow(
                    way, "step", "dpo", shape.rows, shape.hidden, shape.vocab, dtype, version=fp.__version__,
                    logits_dtype=dtype, budget_mib=None if budget is None else budget / MIB, pairs=shape.pairs,
                    prompt_share=shape.prompt_share, softcap=shape.softcap, logits=shape.logits,
                    benchmark="sweep-ranks", ranks=ranks, sent_mib=sent_mib(way, shape, DTYPES[dtype], ranks),
                )
                for way in ways
            ]
            rows = [row for row in rows if not run.results.has(row)]
            started = time.monotonic()
            if not rows:
                run.say("  nothing left to do")
            elif run.out_of_time:
                for row in rows:
                    row.status, row.note = "skipped", "time budget"
                run.results.add(rows)
            else:
                rows = measure(rows, shape, run)
                run.results.add(rows)
                run.screen.print(table(f"{dtype}, {shape} ({time.monotonic() - started:.0f} s)", rows))
        command.finish(run)
    return int(any(row.status in ("wrong", "error", "oom") for row in run.results.rows))


if __name__ == "__main__":
    raise SystemExit(main())
