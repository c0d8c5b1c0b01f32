"""What the benchmarks' command lines share: options, the shapes they ask for, and the conditions of a run."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import plots
from .harness import console, keep_freed_memory, memory_limit
from .peers import MIB, PEERS
from .presets import PRESETS, QUICK
from .problem import DTYPES, LOGITS, REAL, Shape
from .records import Results, Row

IMPLEMENTATIONS = ("fastpref", *PEERS)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """With the options of every benchmark that runs something."""
    found = argparse.ArgumentParser(
        prog=f"fastpref bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--output", type=Path, metavar="DIR", help="JSON and plots go there; an interrupted run goes on")
    found.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast is it")
    found.add_argument("--device", help="default: cuda where there is one, else cpu")
    found.add_argument("--threads", type=positive, help="of a CPU; default: as torch finds")
    found.add_argument("--rounds", type=positive, help="default: 9 on a CPU, 24 on a GPU; 2 with --quick")
    found.add_argument("--no-plots", action="store_true", help="`fastpref bench plots` draws them from the JSON")
    found.add_argument("--seconds", type=float, default=math.inf, help="no cell begins after them")
    return found


def add_shapes(found: argparse.ArgumentParser) -> None:
    """Options of what has a head: presets, or sizes in place of theirs. Several values of one: each in turn."""
    group = found.add_argument_group("shapes", "each of several values in turn; sizes take the place of the presets'")
    group.add_argument("--preset", nargs="+", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    group.add_argument("--rows", nargs="+", type=positive, metavar="N", help="scored rows of a micro-batch")
    group.add_argument("--hidden", nargs="+", type=positive, metavar="H")
    group.add_argument("--vocab", nargs="+", type=positive, metavar="V")
    group.add_argument("--pairs", nargs="+", type=positive, metavar="PAIRS")
    group.add_argument("--prompt-share", nargs="+", type=float, metavar="SHARE", help="of the input's rows, in [0, 1)")
    found.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, fp32 and bf16 on a CPU")
    found.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", help=f"of {', '.join(IMPLEMENTATIONS)}"
    )


def add_logits(found: argparse.ArgumentParser, default: Sequence[str]) -> None:
    found.add_argument(
        "--logits", nargs="+", choices=(*LOGITS, REAL), default=list(default), metavar="KIND",
        help=f"{', '.join(LOGITS)}: drawn; {REAL}: that model's own, and its H and V; default: {', '.join(default)}",
    )


def add_budgets(found: argparse.ArgumentParser) -> None:
    found.add_argument("--budget-mib", nargs="+", type=float, help="fastpref's; default: 2048 on a GPU, 256 on a CPU")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def budgets(options: argparse.Namespace) -> tuple[int | None, ...]:
    """Bytes; None: fastpref's default."""
    if any(mib <= 0 for mib in options.budget_mib or ()):
        raise ValueError(f"--budget-mib is {options.budget_mib}; it takes positive numbers")
    return tuple(round(mib * MIB) for mib in options.budget_mib or ()) or (None,)


SIZES = ("pairs", "rows", "hidden", "vocab", "prompt_share")


def shapes(options: argparse.Namespace, default: Sequence[Shape]) -> list[Shape]:
    """What the options ask for; `default` if they ask for nothing. Sizes given replace those of each preset."""
    if options.quick:
        found = [QUICK.shape]
    elif options.preset:
        found = [PRESETS[name].shape for name in options.preset]
    elif any(getattr(options, name) for name in SIZES):
        found = list(default[:1])
    else:
        return with_logits(options, default)
    return with_logits(options, resized(options, found))


def with_logits(options: argparse.Namespace, found: Sequence[Shape]) -> list[Shape]:
    """Each with every kind of logits that the options ask for, where they can."""
    asked = getattr(options, "logits", None)
    if asked and REAL in asked and (options.preset or options.hidden or options.vocab):
        raise ValueError(f"--logits {REAL} brings its own H and V: leave --preset, --hidden and --vocab out")
    return list(dict.fromkeys(s.with_logits(kind) for s in found for kind in asked)) if asked else list(found)


def resized(options: argparse.Namespace, found: Sequence[Shape]) -> list[Shape]:
    """With the sizes that the options give in place of those of each shape."""
    for name in SIZES:
        if values := getattr(options, name):
            found = [_sized(shape, name, value) for shape in found for value in values]
    return list(dict.fromkeys(found))


def _sized(shape: Shape, name: str, value: Any) -> Shape:
    change = {name: value}
    if name == "pairs":  # so that more pairs alone are not refused: rows stay as near as whole sequences allow
        change["rows"] = max(1, shape.rows // (2 * value)) * 2 * value
    return replace(shape, **change)


@dataclass
class Session:
    options: argparse.Namespace
    device: torch.device
    screen: Console
    results: Results
    rounds: int
    least: int  # of what is slow
    deadline: float
    started: float

    def say(self, line: str) -> None:
        self.screen.print(line, markup=False, soft_wrap=True)

    def progress(self, number: int, count: int, what: object) -> None:
        self.say(f"[{number}/{count}, {time.monotonic() - self.started:.0f} s] {what}")

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


@contextmanager
def session(options: argparse.Namespace, benchmark: str, kind: type[Row] = Row) -> Iterator[Session]:
    """Conditions of the protocol around a run; says where the rows are, also when it is interrupted."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {options.device}; it takes cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and there is no CUDA device here")
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    rounds = options.rounds or (2 if options.quick else 24 if device.type == "cuda" else 9)
    least = min(rounds, 20 if device.type == "cuda" else 3)
    conditions = {"rounds_asked": rounds}
    if device.type == "cpu":
        conditions["freed_memory"] = "kept" if keep_freed_memory() else "returned"
    results = Results.open(options.output, benchmark, device, kind, **conditions)
    started = time.monotonic()
    found = Session(options, device, console(), results, rounds, least, started + options.seconds, started)
    if results.rows:
        found.say(f"{results.path} has {len(results.rows)} rows of this machine and revision; going on from there")
    try:
        with memory_limit(device):
            yield found
    except KeyboardInterrupt:
        if results.path is not None:
            found.say(f"interrupted; {results.path} keeps what there is, and the same command goes on from there")
        raise
    finally:
        torch.set_num_threads(before)


def finish(run: Session) -> None:
    if run.results.path is not None and run.results.rows:
        run.say(f"rows: {run.results.path}")
    for path in () if run.options.no_plots else plots.of_results(run.results):
        run.say(f"plot: {path}")
    rows = run.results.rows
    left_out = sum(row.status == "skipped" and row.note == "time budget" for row in rows)
    if left_out and not any(row.status in ("ok", "wrong", "oom", "error") for row in rows):
        raise ValueError(f"--seconds {run.options.seconds:g} were over before anything was measured: allow more")
    if run.options.quick:
        run.say("--quick is a smoke test: of shapes so small the times are fixed costs; leave it out to measure speed")
    if left_out:
        run.say(f"{left_out} measurements skipped for time; --seconds allows more")
