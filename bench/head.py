"""The fused head: a step of a preference loss against its bare GEMMs and every peer.

    fastpref bench head                                      the cells and gates of this device
    fastpref bench head --preset llama3-8b --dtype bf16      other cells
    fastpref bench head --hidden 512 --vocab 32000 --rows 1024 2048 --impl fastpref trl --output runs/head

Protocol: bench/README.md. Cells stand in the order of their importance; what --seconds does not reach is recorded as
skipped. On a CPU the default cells take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from fastpref.plan import DEFAULT_BUDGET

from . import command, gates, memory
from .harness import Cell, all_right, measure, table
from .peers import BY_DEFAULT, MIB, OPS, Implementation, Missing, fastpref, fastpref_backends, peer
from .presets import PRESETS
from .problem import DTYPES, LOSSES, Shape
from .records import Row, label

# CPU: 16 sequences of 128 scored tokens, without and with a prompt as long as the response.
CPU_SHAPES = [
    Shape(2048, hidden, vocab, prompt_share=share)
    for hidden, vocab in ((512, 32000), (1024, 128256))
    for share in (0.0, 0.5)
]
# GPU: sequences of 512 scored tokens, no prompts: every row of the input is scored, so nobody pays for padding.
MAIN = PRESETS["llama3-8b"].shape
LARGE = replace(MAIN, rows=2 * MAIN.rows, pairs=2 * MAIN.pairs)
OTHERS = (
    *(PRESETS[name].shape for name in ("qwen2.5-7b", "gemma2-9b", "mistral-7b")),
    replace(MAIN, rows=MAIN.rows // 2, pairs=MAIN.pairs // 2),
)
DEFAULT, LARGER, SMALLER = DEFAULT_BUDGET["cuda"], 4096 * MIB, 1024 * MIB


class Group(NamedTuple):
    """A cell and its contestants, timed together."""

    cell: Cell
    peers: tuple[str, ...] = ()
    budgets: tuple[int | None, ...] = (None,)  # fastpref's, one for each plan; empty: it does not take part
    backends: tuple[str, ...] | None = None  # None: the default one

    def contestants(self, device: torch.device) -> Iterator[Implementation | Missing]:
        """fastpref first."""
        backends = self.backends or fastpref_backends(device, DTYPES[self.cell.dtype])[:1]
        seen = set[Any]()
        for backend, budget in product(backends, self.budgets):
            for logits in (None, "bf16") if device.type == "cuda" else (None,):  # elsewhere bf16 is bf16's default
                ours = fastpref(backend, budget, logits)
                schedule = backend, logits, self._schedule(ours, device)
                if schedule not in seen:  # at N 8192 1, 2 and 4 GiB make the same plan: timed once
                    yield ours
                seen.add(schedule)
        for name in self.peers:
            if name != "naive_all" or self.cell.shape.prompt_share:  # without prompts it is naive
                yield peer(name, device.type)

    def _schedule(self, ours: Implementation, device: torch.device) -> Any:
        """What a budget comes to; the budget itself where it does not suffice."""
        assert ours.plan is not None
        cell = self.cell
        try:
            return replace(ours.plan(cell.shape, cell.op, cell.loss, DTYPES[cell.dtype], device.type), budget=0)
        except ValueError:
            return ours.budget


def gpu_groups(device: torch.device, backends: Sequence[str] | None = None) -> Iterator[Group]:
    """Most important first: what is claimed, on both sizes, beside the peers that start at once; then Liger, which
    compiles for half a minute; then the rest. backends: those that work there, the default first; None: ask."""
    every_budget = (DEFAULT, LARGER, SMALLER)
    backends = tuple(backends or fastpref_backends(device, torch.bfloat16))
    other_losses = [loss for loss in LOSSES if loss != "dpo"]

    def group(shape: Shape, op: str, loss: str, peers: tuple[str, ...] = (), budgets: tuple = (DEFAULT,)) -> Group:
        return Group(Cell(shape, "bf16", op, loss), peers, budgets, backends[:1])

    for shape in (MAIN, LARGE):
        step = group(shape, "step", "dpo", ("naive", "trl"), every_budget)
        yield step._replace(backends=backends) if shape is MAIN else step
        for op in ("frozen", "forward"):
            yield group(shape, op, "dpo")
    for shape in (MAIN, LARGE):
        yield group(shape, "step", "dpo", ("liger", "unsloth-zoo"))
        yield group(shape, "step", "sft", ("quack",))
    for shape in OTHERS:
        yield group(shape, "step", "dpo", ("naive", "trl", "liger"), every_budget)
        for op in ("frozen", "forward"):
            yield group(shape, op, "dpo")
    for shape in (MAIN, LARGE):
        for op in ("frozen", "forward"):
            yield group(shape, op, "dpo", ("naive", "trl", "liger", "unsloth-zoo"), every_budget)
    for shape in (MAIN, LARGE, *OTHERS):
        for loss in other_losses:
            yield group(shape, "step", loss, (), (DEFAULT, LARGER) if shape in (MAIN, LARGE) else (DEFAULT,))
    # What compiles for a minute or is known to be far behind.
    for shape in (MAIN, LARGE):
        yield group(shape, "step", "dpo", ("cce", "torch_lce", "naive_compiled"))


def chosen_groups(options: argparse.Namespace, device: torch.device, shapes: Sequence[Shape]) -> Iterator[Group]:
    """Every combination of what was asked for."""
    dtypes = options.dtype or (["bf16"] if device.type == "cuda" else ["fp32", "bf16"])
    named = options.impl or ["fastpref", *BY_DEFAULT]
    peers = tuple(name for name in named if name != "fastpref")
    budgets = command.budgets(options) if "fastpref" in named else ()
    for shape, dtype, op, loss in product(shapes, dtypes, options.op, options.loss):
        yield Group(Cell(shape, dtype, op, loss), peers, budgets)


def run_groups(
    groups: Sequence[Group], run: command.Session, *, resident: bool = False, tolerance: float = 1.0
) -> None:
    """Measures what the results do not have yet.

    resident: also the system's view of a CPU's memory. tolerance: of results, times the usual one.
    """
    for number, group in enumerate(groups, 1):
        cell, started = group.cell, time.monotonic()
        given = list(group.contestants(run.device))
        missing = [cell.gap(each.name, "missing", each.why) for each in given if isinstance(each, Missing)]
        running = [each for each in given if isinstance(each, Implementation)]
        running = [each for each in running if not run.results.has(cell.row(each, run.device.type))]
        run.progress(number, len(groups), cell if running else f"{cell}: nothing left to do")
        rows = []
        if running and run.out_of_time:
            rows = [cell.row(each, run.device.type) for each in running]
            for row in rows:
                row.status, row.note = "skipped", "time budget"
            run.say("  skipped: time budget")
        elif running:
            rows = measure(
                cell, running, run.device, rounds=run.rounds, least=run.least, deadline=run.deadline,
                tolerance=tolerance, say=run.say,
            )
            for row, implementation in zip(rows, running):
                if resident and row.status == "ok":
                    row.peak_rss_mib = memory.peak_rss_mib(cell, implementation)
            run.screen.print(table(f"{cell} ({time.monotonic() - started:.0f} s)", rows + missing))
        run.results.add(rows + [row for row in missing if not run.results.has(row)])


def show(groups: Sequence[Group], device: torch.device) -> None:
    """What would run, in this order, and by which plan: a line a cell."""
    for number, group in enumerate(groups, 1):
        what, absent = [], []
        for each in group.contestants(device):
            if isinstance(each, Missing):
                absent.append(each.name)
                continue
            row = group.cell.row(each, device.type)
            plan = f" (plan {row.plan_mib:.0f} MiB)" if row.plan_mib else ""
            what.append(label(asdict(row)) + plan if row.status == "ok" else f"{each.label}: {row.note}")
        print(f"{number}. {group.cell}: {'; '.join(what)}{'; missing: ' if absent else ''}{', '.join(absent)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_shapes(parser)
    command.add_budgets(parser)
    parser.add_argument("--op", nargs="+", choices=OPS, default=["step"], help="default: step")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["dpo"], help="default: dpo")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where fastpref is right wherever it was run. A missed gate is a finding, not a failure."""
    parser = command.parser("head", __doc__ or "")
    add_arguments(parser)
    command.add_logits(parser, ["trained"])
    parser.add_argument("--dry-run", action="store_true", help="the cells of a GPU, their order and plans; needs none")
    options = parser.parse_args(arguments)
    if options.dry_run:
        cuda = torch.device("cuda")
        show(list(gpu_groups(cuda, ("triton", "cuda"))), cuda)
        return 0
    asked = [name for name in (*command.SIZES, "preset", "dtype", "impl", "budget_mib") if getattr(options, name)]
    standard = not asked and not options.quick and options.op == ["step"] and options.loss == ["dpo"]
    standard = standard and options.logits == ["trained"]
    with command.session(options, "head") as run:
        if standard and run.device.type == "cuda":
            groups = list(gpu_groups(run.device))
        else:
            default = CPU_SHAPES if run.device.type == "cpu" else [MAIN]
            shapes = command.shapes(options, default)
            if options.quick and not options.prompt_share:
                shapes = [replace(shape, prompt_share=share) for shape in shapes for share in (0.0, 0.5)]
            groups = list(chosen_groups(options, run.device, shapes))
        run_groups(groups, run, resident=run.device.type == "cpu" and not options.quick)
        rows: list[Row] = run.results.rows
        if standard:
            cuda = run.device.type == "cuda"
            found = gates.on_gpu(rows, gates.copy_rate(run.device)) if cuda else gates.on_cpu(rows)
            gates.show_gates(found, run.screen)
        command.finish(run)
    return int(not all_right(rows))
