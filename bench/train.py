"""Preference training as the trainer does it, within the memory of a card: speed, MFU, peak against plan, and peers.

    fastpref bench train                        the cells of this device
    fastpref bench train --cell 48gb            one of them
    fastpref bench train --quick --device cpu   a tiny model: does it run

DPO on random weights and tokens, lengths like UltraFeedback's; every implementation in a process of its own
(train_cell.py says what each is). On a GPU the process may take no more than the card it stands for:

    80gb    Llama 3.1 8B, all weights, 16k tokens a micro-batch, gradients accumulated over two; beside TRL
    48gb    the same, updated inside the backward pass
    24gb    Qwen 2.5 7B, LoRA, 4k tokens a micro-batch, four a step

On a CPU a model of 38M parameters on sequences half as long, in fp32.

The recipe is one that `fastpref plan --model` says fits, with 5 % to spare. Beside peers everybody runs with
activation checkpointing on (the inputs of every layer kept, TRL's default) and off; alone, the least that fits. The
gradient norm of the first step is compared: it is the same for everybody. Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import yaml
from rich.table import Table

import fastpref
from fastpref.train import memory_estimate
from fastpref.train.memory_estimate import CONTEXT, KINDS, RECIPES, Terms

from . import command, gates
from .gates import same_setting
from .peers import MIB, _version
from .records import Row
from .revision import ROOT
from .step import model_config
from .train_cell import Spec, config_of, preset_of, steps_of

IMPLEMENTATIONS = ("fastpref", "trl", "naive")
MARGIN = 0.05  # by which a plan may be off
# Of the gradient norm. TRL gives every micro-batch of a step the same weight, however many pairs are in it.
TOLERANCE = {("naive", "fp32"): 1e-3, ("naive", "bf16"): 0.05, ("trl", "fp32"): 0.1, ("trl", "bf16"): 0.1}
MOST_SPLITS = 8
LEAST_SECONDS = 20  # in which a process can come to its first step
PATIENCE = 3  # seconds between SIGINT and SIGKILL


class Cell(NamedTuple):
    name: str
    preset: str
    recipe: str  # the label of one of memory_estimate.RECIPES
    max_tokens: int
    accumulation: int
    card_gb: float | None = None  # decimal gigabytes, as on the box
    peers: bool = False
    shorter: int = 1
    checkpointing: str | None = None  # "full", "none": for everybody; None: the least that fits

    def __str__(self) -> str:
        card = f", within {self.card_gb:g} GB" if self.card_gb else ""
        kept = {"full": ", checkpointing on", "none": ", checkpointing off"}.get(self.checkpointing or "", "")
        steps = f"{self.accumulation} x {self.max_tokens} tokens a step"
        return f"{self.name}: {self.preset}, {self.recipe}, {steps}{card}{kept}"


# In the order of what they tell.
GPU_CELLS = (
    Cell("80gb", "llama3.1-8b", "bf16, 8-bit AdamW", 16384, 2, 80, peers=True),
    Cell("48gb", "llama3.1-8b", "+ in backward", 16384, 1, 48),
    Cell("24gb", "qwen2.5-7b", "LoRA on bf16", 4096, 4, 24),
)
CPU_CELLS = (Cell("cpu", "cpu-small", "fp32 AdamW", 2048, 2, peers=True, shorter=2),)
QUICK_CELL = Cell("quick", "quick", "fp32 AdamW", 256, 2, peers=True, shorter=20)
CELLS = {cell.name: cell for cell in (*GPU_CELLS, *CPU_CELLS, QUICK_CELL)}


@dataclass
class TrainRow(Row):
    """N: scored tokens of the first timed step, pairs: its pairs. A round is a step; peers have no plan."""

    cell: str = ""
    model: str = ""
    layers: int = 0
    recipe: str = ""
    checkpointing: str = ""
    max_tokens: int = 0  # of a micro-batch
    accumulation: int = 1
    card_gb: float | None = None
    pairs_per_s: float | None = None
    tokens_per_s: float | None = None  # that fastpref's trunk reads: each prompt once, no padding
    mfu: float | None = None
    peak_mib: float | None = None  # allocated by torch on a GPU, resident on a CPU
    reserved_mib: float | None = None  # by torch on a GPU
    grad_norm: float | None = None  # of the first step
    grad_norm_rel_err: float | None = None  # a peer's, to fastpref's
    split: int = 1  # so many times as many micro-batches, because larger ones did not fit


# ---- what to run -----------------------------------------------------------------------------------------------------


def settings(cell: Cell) -> list[Cell]:
    """What is run of it: beside peers with checkpointing on, TRL's default, then off."""
    return [cell._replace(checkpointing=kind) for kind in ("full", "none")] if cell.peers else [cell]


def plan_of(cell: Cell) -> Terms | None:
    """The recipe with the cell's checkpointing, or the least that fits the card by its plan; None where there is no
    card.

    Raises ValueError where nothing fits.
    """
    if cell.card_gb is None:
        return None
    sizes = memory_estimate.measure(model_config(preset_of(cell.preset)), cell.max_tokens)
    recipe = recipe_of(cell)
    if recipe.lora and not sizes.lora:
        raise ValueError(f"{cell.name}: {sizes.no_lora}")
    for kind in [cell.checkpointing] if cell.checkpointing else KINDS[:-1]:
        found = memory_estimate.terms(sizes, recipe, kind)
        if (1 + MARGIN) * found.total <= cell.card_gb * 1e9:
            return found
    raise ValueError(f"{cell.name}: by its plan {cell.recipe} does not fit {cell.card_gb:g} GB")


def fitted(cell: Cell) -> tuple[Cell, Terms | None]:
    """Where a setting does not fit at the cell's size: half the tokens, twice as many micro-batches, up to eight times.

    Raises ValueError where nothing fits.
    """
    times = 1
    while True:
        smaller = cell._replace(max_tokens=cell.max_tokens // times, accumulation=cell.accumulation * times)
        try:
            return smaller, plan_of(smaller)
        except ValueError:
            if cell.checkpointing is None or times == MOST_SPLITS:
                raise
            times *= 2


def recipe_of(cell: Cell) -> memory_estimate.Recipe:
    (found,) = (recipe for recipe in RECIPES if recipe.label.strip() == cell.recipe)
    return found


def spec_of(cell: Cell, impl: str, plan: Terms | None, run: command.Session | DryRun) -> Spec:
    given = plan.keys if plan else recipe_of(cell).keys
    keys = {key: yaml.safe_load(value) for key, value in given.items()}
    if cell.checkpointing:
        keys["gradient_checkpointing"] = cell.checkpointing
    return Spec(
        impl, cell.preset, str(run.device), keys, cell.max_tokens, cell.accumulation, 1 + run.rounds,
        cell.card_gb if impl == "fastpref" else None, cell.shorter, threads=torch.get_num_threads(),
    )


def row_of(cell: Cell, spec: Spec, plan: Terms | None) -> TrainRow:
    preset, step = preset_of(cell.preset), list(chain.from_iterable(steps_of(spec)[1]))
    version = {"fastpref": fastpref.__version__, "trl": _version("trl") or "", "naive": torch.__version__}[spec.impl]
    dtype = "bf16" if spec.keys["dtype"] == "bfloat16" else "fp32"
    checkpointing = spec.keys.get("gradient_checkpointing", "none")
    found = TrainRow(
        spec.impl, "train", "dpo", sum(len(ids) for e in step for ids in e.responses), preset.shape.hidden,
        preset.shape.vocab, dtype, version=version, pairs=len(step), benchmark="train", cell=cell.name,
        model=cell.preset, layers=preset.config["num_hidden_layers"], recipe=cell.recipe, checkpointing=checkpointing,
        max_tokens=cell.max_tokens, accumulation=cell.accumulation, card_gb=cell.card_gb,
    )
    if spec.impl != "fastpref":
        found.recipe = f"{dtype}, torch's AdamW"
    elif plan:
        found.plan_mib = (plan.total - CONTEXT) / MIB
    return found


def missing(cell: Cell, impl: str) -> str:
    """Why it cannot run here; empty if it can."""
    needs = {"trl": ("trl", "datasets")}.get(impl, ())
    if impl == "fastpref":
        needs = (("torchao",) if "8-bit" in cell.recipe or "backward" in cell.recipe else ()) + (
            ("peft",) if "LoRA" in cell.recipe else ()
        )
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


# ---- a process -------------------------------------------------------------------------------------------------------


def measured(spec: Spec, run: command.Session) -> dict[str, Any]:
    """The measured fields of its row, from a process of its own; peers in smaller parts where theirs do not fit."""
    while True:
        found = _once(spec, run)
        found["split"] = spec.split
        again = found.get("status") == "oom" and spec.impl != "fastpref" and spec.split < MOST_SPLITS
        if not again or run.out_of_time:
            return found
        spec = replace(spec, split=2 * spec.split)
        run.say(f"  {spec.impl}: out of memory; again in {spec.split} times as many micro-batches")


def process(spec: Spec, seconds: float) -> subprocess.CompletedProcess[str]:
    """Out of time or interrupted, it says where it was before it ends."""
    # what torch advises against fragmentation, for everybody
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    command = [sys.executable, "-m", "bench.train_cell", json.dumps(asdict(spec))]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        out, err = child.communicate(timeout=seconds if seconds < 1e9 else None)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.send_signal(signal.SIGINT)
        try:
            _, err = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            _, err = child.communicate()
        print(err, file=sys.stderr)
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def _once(spec: Spec, run: command.Session) -> dict[str, Any]:
    left = run.deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return {"status": "skipped", "note": "time budget"}
    try:
        child = process(spec, left)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "note": "time budget"}
    if child.returncode < 0:  # by the system: on a CPU most likely for its memory
        return {"status": "error", "note": f"ended by signal {-child.returncode}"}
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["no output"]
        return {"status": "error", "note": lines[-1][:200]}
    return json.loads(child.stdout.splitlines()[-1])


def run_cell(cell: Cell, impls: Sequence[str], run: command.Session) -> None:
    """Measures what the results do not have yet."""
    started = time.monotonic()
    try:
        cell, plan = fitted(cell)
    except ValueError as error:
        run.say(f"  left out: {error}")
        return
    rows = []
    for impl in impls if cell.peers else [name for name in impls if name == "fastpref"]:
        spec = spec_of(cell, impl, plan, run)
        row = row_of(cell, spec, plan)
        if run.results.has(row):
            rows.append(next(one for one in run.results.rows if same_setting(one, row) and one.impl == impl))
            continue
        if why := missing(cell, impl):
            row.status, row.note = "missing", why
        else:
            for name, value in measured(spec, run).items():
                setattr(row, name, value)
        rows.append(row)
        compare(row, rows[0])
        run.say(f"  {impl}: {row.status} {row.note}")
        run.results.add([row])
    run.screen.print(table(f"{cell} ({time.monotonic() - started:.0f} s)", rows))


def compare(row: TrainRow, ours: TrainRow) -> None:
    """The gradient of the first step, before anything has moved, is the same for everybody."""
    if row is ours or ours.impl != "fastpref" or row.grad_norm is None or not ours.grad_norm:
        return
    row.grad_norm_rel_err = abs(row.grad_norm / ours.grad_norm - 1)
    if not row.grad_norm_rel_err <= TOLERANCE[row.impl, row.dtype]:
        row.status, row.note = "wrong", f"first gradient norm {row.grad_norm:.4g}, fastpref's {ours.grad_norm:.4g}"


# ---- what a reader sees ----------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[TrainRow]) -> Table:
    found = Table(title=title, title_justify="left", caption_justify="left")
    columns = ("pairs/s", "tokens/s", "MFU", "ms a step", "peak GiB", "plan GiB", "1st grad norm")
    for name in ("", "weights and optimiser", "checkpointing", *columns):
        found.add_column(name, justify="right" if name in columns else "left")
    for row in rows:
        peak = "" if row.peak_mib is None else f"{row.peak_mib / 1024:.1f}"
        if row.ms_median is None:
            found.add_row(row.impl, row.recipe, row.checkpointing, f"{row.status}: {row.note}", "", "", "", peak)
            continue
        found.add_row(
            row.impl, row.recipe, row.checkpointing, f"{row.pairs_per_s:.3g}", f"{row.tokens_per_s:,.0f}",
            "" if row.mfu is None else f"{row.mfu:.0%}", f"{row.ms_median:,.0f}", peak,
            "" if row.plan_mib is None else f"{row.plan_mib / 1024:.1f}", f"{row.grad_norm:.4g}",
        )
    return found


def show(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """The first setting of each cell: its plan, its configuration and its steps."""
    for cell, *others in map(settings, cells):
        cell, plan = fitted(cell)
        for impl in options.impl or IMPLEMENTATIONS[:2] if cell.peers else ("fastpref",):
            spec = replace(spec_of(cell, impl, plan, DryRun(options.rounds or 3)), device="cuda")
            config_of(spec)
            row, why = row_of(cell, spec, plan), missing(cell, impl)
            planned = "" if row.plan_mib is None else f", plan {row.plan_mib / 1024:.1f} GiB"
            print(f"{cell}: {impl}, {row.pairs} pairs in a step{planned}{f'; MISSING: {why}' if why else ''}")
        for each in others:
            print(f"{each}: as far as it fits")


class DryRun(NamedTuple):
    rounds: int
    device: torch.device = torch.device("cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("train", __doc__ or "")
    parser.add_argument("--cell", nargs="+", choices=CELLS, metavar="NAME", help=", ".join(CELLS))
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME",
        help=f"of {', '.join(IMPLEMENTATIONS)}; default: all on a CPU; on a GPU naive only where TRL is not installed",
    )
    parser.add_argument("--dry-run", action="store_true", help="what a GPU would run, and by which plan; needs none")
    options = parser.parse_args(arguments)
    if options.dry_run:
        show([CELLS[name] for name in options.cell or [cell.name for cell in GPU_CELLS]], options)
        return 0
    cuda = torch.cuda.is_available() if options.device is None else options.device.startswith("cuda")
    names = ["quick"] if options.quick else options.cell or [cell.name for cell in (GPU_CELLS if cuda else CPU_CELLS)]
    if not cuda and (large := [name for name in names if CELLS[name].card_gb]):
        raise ValueError(f"--cell {' '.join(large)}: takes a GPU; on a CPU there is {CPU_CELLS[0].name}")
    impls = options.impl or [
        name for name in IMPLEMENTATIONS if not cuda or name != "naive" or missing(CELLS[names[0]], "trl")
    ]
    options.rounds = options.rounds or (1 if options.quick else 3)
    with command.session(options, "train", TrainRow) as run:
        cells = [setting for name in names for setting in settings(CELLS[name])]
        for number, cell in enumerate(cells, 1):
            run.progress(number, len(cells), cell)
            run_cell(cell, impls, run)
        if not options.quick:
            gates.show_gates(gates.of_training(run.results.rows), run.screen)
        command.finish(run)
    bad = ("wrong", "error")  # a peer that does not fit is a finding
    return int(any(row.status in (*bad, "oom" if row.impl == "fastpref" else "") for row in run.results.rows))


if __name__ == "__main__":
    raise SystemExit(main())
