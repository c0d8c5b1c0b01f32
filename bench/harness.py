"""Common parts of the benchmarks: check, interleaved timing, peak memory, rows of the result, tables, gates.

The protocol is in README.md; this file is where it happens.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastpref

from .peers import MIB, Implementation, Result
from .problem import DTYPES, Batch, Shape, Truth, make_batch, relative

# The profiler, which counts CPU memory below, announces itself on stderr each time unless this is set before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SCHEMA = 1
GEMMS_OF = {"forward": 1, "frozen": 2, "step": 3}

# What a result may be off by and still count as the right one. Not a measure of quality (the errors themselves are in
# the rows): bf16 logits of size 20 are rounded by 0.06.
LOGP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}  # nats: a token, or a sequence's mean
GRAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # relative Frobenius norm


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the result
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One implementation in one cell: a line of the table, an object of the JSON list. None: not measured."""

    impl: str
    op: str  # "step": gradients of hidden and weight; "frozen": of hidden; "forward": none
    loss: str
    N: int  # scored rows
    H: int
    V: int
    dtype: str
    status: str = "ok"  # "wrong": not timed; "error", "missing", "skipped": see note
    note: str = ""
    version: str = ""
    backend: str | None = None  # fastpref's row kernels
    logits_dtype: str = ""
    budget_mib: float | None = None
    prompt_share: float = 0.0
    softcap: float | None = None
    pairs: int = 0
    gemms: float | None = None  # GEMMs over N rows it does
    rounds: int = 0
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    ms_gemm: float | None = None  # median of the bare GEMMs (3, 2 or 1 by op) in the same rounds
    ratio: float | None = None  # median over rounds of time / time of the GEMMs of that round
    peak_extra_mib: float | None = None  # torch's allocator, beyond what is there after the call
    peak_rss_mib: float | None = None  # CPU: the process's high-water mark, likewise
    plan_mib: float | None = None
    logp_max_err: float | None = None  # nats, worst token; where only sequences are shown, worst sequence / its length
    logp_err_of: str = ""  # "token" or "sequence"
    dx_rel_err: float | None = None
    dw_rel_err: float | None = None
    loss_err: float | None = None


def environment(device: torch.device) -> dict[str, object]:
    """What a row must say about where it comes from."""
    cuda = device.type == "cuda"
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_model(),
        "driver": _driver() if cuda else None,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastpref": fastpref.__version__,
        "revision": _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _driver() -> str | None:
    found = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _revision() -> str | None:
    """Git revision of this checkout, "+" if it differs from it."""
    here = str(Path(__file__).parent)
    revision = _output_of("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    if revision and _output_of("git", "-C", here, "status", "--porcelain", "--untracked-files=no"):
        revision += "+"
    return revision


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Results:
    """Rows so far, on disk after every cell: an interrupted run keeps what it has."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path, self.environment, self.rows = path, environment(device), list[Row]()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Iterable[Row]) -> None:
        self.rows.extend(rows)
        if self.path is not None:
            partial = self.path.with_suffix(self.path.suffix + ".partial")
            plain = [_plain(self.environment | asdict(row)) for row in self.rows]
            partial.write_text(json.dumps(plain, indent=1) + "\n")
            os.replace(partial, self.path)


def _plain(row: dict[str, object]) -> dict[str, object]:
    """Six digits; JSON has no inf and no NaN."""

    def plain(value: object) -> object:
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)

    return {name: plain(value) for name, value in row.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A cell: one shape, dtype, op and loss
# ---------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    shape: Shape
    dtype: str
    op: str
    loss: str

    def row(self, implementation: Implementation, device: str) -> Row:
        dtype = DTYPES[self.dtype]
        row = self.gap(implementation.name, "ok", "")
        row.version, row.backend = implementation.version, implementation.backend
        row.gemms = implementation.gemms(self.shape, self.op)
        row.logits_dtype = implementation.logits_dtype(dtype, device) if implementation.logits_dtype else self.dtype
        if implementation.plan is not None:
            plan = implementation.plan(self.shape, self.op, self.loss, dtype, device)
            row.budget_mib, row.plan_mib, row.gemms = plan.budget / MIB, plan.bytes / MIB, plan.gemms
        return row

    def gap(self, name: str, status: str, note: str) -> Row:
        """The row of an implementation that was not run."""
        s = self.shape
        return Row(
            name, self.op, self.loss, s.rows, s.hidden, s.vocab, self.dtype, status, note, logits_dtype=self.dtype,
            prompt_share=s.prompt_share, softcap=s.softcap, pairs=s.pairs,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.loss} {self.op}, {self.dtype}, {self.shape}"


class Gemms:
    """The bare GEMMs of an op into buffers that exist, in the inputs' dtype."""

    def __init__(self, batch: Batch, op: str) -> None:
        self.op, self.weight, self.x = op, batch.weight.detach(), batch.rows().detach().contiguous()
        self.logits = self.x.new_empty(batch.shape.rows, batch.shape.vocab)
        if op != "forward":
            # Operands like the real ones: a GPU's clock depends on the bits that it multiplies.
            torch.mm(self.x, self.weight.t(), out=self.logits)
            self.residuals = torch.empty_like(self.logits)
            for rows, out in zip(self.logits.split(256), self.residuals.split(256)):
                out.copy_(torch.softmax(rows.float(), 1).neg_())
            self.dx = torch.empty_like(self.x)
        if op == "step":
            self.dw = torch.empty_like(self.weight)

    def __call__(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.logits)
        if self.op != "forward":
            torch.mm(self.residuals, self.weight, out=self.dx)
        if self.op == "step":
            torch.mm(self.residuals.t(), self.x, out=self.dw)


def prepare(batch: Batch, op: str) -> None:
    """Leaves as the op wants them, without gradients. Their freeing is not part of what is measured."""
    batch.hidden.grad = batch.weight.grad = None
    batch.hidden.requires_grad_(op != "forward")
    batch.weight.requires_grad_(op == "step")


def run(implementation: Implementation, batch: Batch, op: str, loss: str) -> Result:
    """One call as a training step makes it; gradients end up in `.grad`."""
    recording: AbstractContextManager = torch.no_grad() if op == "forward" else nullcontext()
    with recording:
        result = implementation.run(batch, loss)
    if op != "forward":
        result.loss.backward()
    return result


T = TypeVar("T")


@dataclass(frozen=True)
class Watched(Generic[T]):
    result: T
    extra_bytes: int  # most that torch's allocator had handed out, beyond what is there after the call
    milliseconds: float


def watched(call: Callable[[], T], device: torch.device) -> Watched[T]:
    """A call with its peak memory. What stays (gradients, the result) is not counted, freed inputs neither."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(device)
        milliseconds = (time.perf_counter() - start) * 1e3
        extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return Watched(result, extra, milliseconds)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        start = time.perf_counter()
        result = call()
        milliseconds = (time.perf_counter() - start) * 1e3
    now = peak = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Watched(result, peak - now, milliseconds)


def check(implementation: Implementation, batch: Batch, truth: Truth, op: str, loss: str, row: Row) -> float:
    """Runs it once, in ms; writes errors and memory into the row and marks it wrong if beyond the tolerance."""
    prepare(batch, op)
    given = batch if implementation.references else batch.without_references()
    seen = watched(lambda: run(implementation, given, op, loss), batch.device)
    result, row.peak_extra_mib = seen.result, seen.extra_bytes / MIB
    expected = truth.gradients(loss, given)
    logp_limit, grad_limit = LOGP_TOLERANCE[batch.weight.dtype], GRAD_TOLERANCE[batch.weight.dtype]
    wrong = []

    off = _largest(result.logps.detach().double() - truth.logps)
    row.logp_max_err, row.logp_err_of = off / batch.shape.scored_length, "sequence"
    tokens = result.token_logps
    if tokens is None and implementation.tokens is not None:
        with torch.no_grad():
            tokens = implementation.tokens(batch)
    if tokens is not None and row.logp_max_err <= logp_limit:
        row.logp_max_err, row.logp_err_of = _largest(tokens.detach().double() - truth.token_logps), "token"
    if not row.logp_max_err <= logp_limit:
        wrong.append(f"log-probs off by {row.logp_max_err:.2g} nats a {row.logp_err_of}")

    # The loss may be off by what its log-probs are off by, twice for the second order.
    row.loss_err = _largest(result.loss.detach().double() - expected.loss)
    if not row.loss_err <= 1e-3 * (1 + abs(float(expected.loss))) + 2 * off * float(expected.logps.abs().sum()):
        wrong.append(f"loss off by {row.loss_err:.2g}")

    if op != "forward":
        row.dx_rel_err = _gradient_error(batch.hidden.grad, batch.index[truth.rows], expected.hidden)
        if not row.dx_rel_err <= grad_limit:
            wrong.append(f"gradient of hidden off by {row.dx_rel_err:.2g}")
        if batch.hidden.grad is not None and batch.shape.prompt_share:
            prompt = torch.ones(batch.targets.numel(), dtype=torch.bool, device=batch.device)
            prompt[batch.index] = False
            if bool(batch.hidden.grad.flatten(0, 1)[prompt].any()):
                wrong.append("gradient of hidden in rows that are not scored")
    if op == "step":
        row.dw_rel_err = _gradient_error(batch.weight.grad, truth.vocab, expected.weight)
        if not row.dw_rel_err <= grad_limit:
            wrong.append(f"gradient of weight off by {row.dw_rel_err:.2g}")
    if wrong:
        row.status, row.note = "wrong", "; ".join(wrong)
    return seen.milliseconds


def _gradient_error(grad: Tensor | None, rows: Tensor, expected: Tensor) -> float:
    return math.inf if grad is None else relative(grad.reshape(-1, grad.shape[-1])[rows], expected)


def _largest(error: Tensor) -> float:
    """NaN counts as infinite."""
    return float(error.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Freed CPU memory stays in this process for the next call, as with jemalloc or tcmalloc; False without glibc.

    Otherwise large buffers go back to the system after every call. Where this is a virtual machine with free page
    reporting, their pages are then the host's after two seconds, and the first touch costs 2 ns a byte: seen as 65 ms
    of 1010 for a gradient of 62 MiB, and only in those calls that came long enough after the one that freed it.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` things: each equally often in every place and after every other (Williams design)."""
    first = [0]
    for step in range(1, count):
        first.append((first[-1] + (step if step % 2 else -step)) % count)
    square = [[(place + shift) % count for place in first] for shift in range(count)]
    return square if count % 2 == 0 else [order for row in square for order in (row, row[::-1])]


class Stopwatch:
    """Milliseconds of calls: wall clock on a CPU, events on a GPU (read once per round, so that it never idles)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], object]) -> float | None:
        """None on a GPU: see `read`."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        self.pending.append((start_event, end_event))
        return None

    def read(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        found, self.pending = [start.elapsed_time(end) for start, end in self.pending], []
        return found


WARM_SECONDS = 0.5


class Contestant(NamedTuple):
    """before is not timed."""

    before: Callable[[], None]
    call: Callable[[], object]


def time_interleaved(
    contestants: Sequence[Contestant],
    rounds: int,
    device: torch.device,
    *,
    slow: Sequence[bool] = (),
    deadline: float = math.inf,
    least: int = 3,
) -> list[dict[int, float]]:
    """For each contestant {round: ms}; every round runs all of them, in balanced order.

    slow: those that take part in `least` rounds only, spread evenly. deadline (time.monotonic): no further round begins
    after it, once there were `least`.
    """
    watch, found = Stopwatch(device), [dict[int, float]() for _ in contestants]
    if device.type == "cuda":  # clocks fall while the host checks results
        until = time.monotonic() + WARM_SECONDS
        while time.monotonic() < until:
            contestants[0].call()
            torch.cuda.synchronize(device)
    orders = balanced_orders(len(contestants))
    slow_rounds = {round(i * (rounds - 1) / max(1, least - 1)) for i in range(min(least, rounds))}
    for number in range(rounds):
        if number >= least and time.monotonic() > deadline:
            break
        taking_part = [i for i in orders[number % len(orders)] if not (slow and slow[i]) or number in slow_rounds]
        for i in taking_part:
            contestants[i].before()
            milliseconds = watch.time(contestants[i].call)
            if milliseconds is not None:
                found[i][number] = milliseconds
        if device.type == "cuda":
            for i, milliseconds in zip(taking_part, watch.read()):
                found[i][number] = milliseconds
    return found


def fill_times(row: Row, times: dict[int, float], gemms: dict[int, float]) -> None:
    common = sorted(times.keys() & gemms.keys())
    if not common:
        row.status, row.note = "skipped", "time budget"
        return
    values = [times[number] for number in common]
    row.rounds = len(values)
    row.ms_median = statistics.median(values)
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    row.ms_p10, row.ms_p90 = tenths[0], tenths[-1]
    row.ms_gemm = statistics.median(gemms[number] for number in common)
    row.ratio = statistics.median(times[number] / gemms[number] for number in common)


@lru_cache(maxsize=1)
def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Batch, Truth]:
    """Cells of one shape follow each other: inputs and truth are made once."""
    batch = make_batch(shape, dtype, device)
    return batch, Truth(batch)


SLOW = 2.5  # times the GEMMs: then fewer rounds tell as much


def measure(
    cell: Cell,
    implementations: Sequence[Implementation],
    device: torch.device,
    *,
    rounds: int,
    least: int = 3,
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Checks every implementation, then times those that are right. What fails becomes a row, and the run goes on."""
    rows = [cell.row(implementation, device.type) for implementation in implementations]
    try:
        batch, truth = inputs(cell.shape, DTYPES[cell.dtype], device)
        say(f"{cell}: logits' standard deviation {truth.logits_std:.2f}, mean log-prob {truth.token_logps.mean():.2f}")
        gemms = Gemms(batch, cell.op)
        gemms()
        gemms_alone = watched(gemms, device).milliseconds
    except Exception as error:
        for row in rows:
            row.status, row.note = "error", _told(error)
        return rows

    def call(implementation: Implementation) -> Result:
        return run(implementation, batch, cell.op, cell.loss)

    alone = [0.0] * len(rows)
    for i, (row, implementation) in enumerate(zip(rows, implementations)):
        if cell.loss not in implementation.losses:
            row.status, row.note = "missing", f"has no {cell.loss}"
        elif time.monotonic() > deadline:
            row.status, row.note = "skipped", "time budget"
        else:
            try:
                alone[i] = check(implementation, batch, truth, cell.op, cell.loss, row)
                if row.status == "ok" and device.type == "cuda":  # the first call compiled, tuned and loaded things
                    prepare(batch, cell.op)
                    warm = watched(partial(call, implementation), device)
                    row.peak_extra_mib, alone[i] = warm.extra_bytes / MIB, warm.milliseconds
            except NotImplementedError as error:
                row.status, row.note = "missing", str(error)
            except Exception as error:
                row.status, row.note = "error", _told(error)
            _cleared(batch, cell.op, failed=row.status == "error")
            say(f"  {implementation.label}: {row.status} {row.note}")

    running = [i for i, row in enumerate(rows) if row.status == "ok"]
    contestants = [Contestant(lambda: None, gemms)]
    contestants += [
        Contestant(partial(prepare, batch, cell.op), partial(call, implementations[i])) for i in running
    ]
    slow = [False, *(alone[i] > SLOW * gemms_alone for i in running)]
    gemm_times, *times = time_interleaved(contestants, rounds, device, slow=slow, deadline=deadline, least=least)
    for i, of_one in zip(running, times):
        fill_times(rows[i], of_one, gemm_times)
    prepare(batch, "forward")
    return rows


def _cleared(batch: Batch, op: str, *, failed: bool) -> None:
    """No gradients, no tensors held by a traceback, and on a GPU no blocks cut to another one's sizes."""
    prepare(batch, op)
    if failed:
        gc.collect()
    if batch.device.type == "cuda":
        torch.cuda.empty_cache()


def _told(error: BaseException) -> str:
    """One line; out of memory as such, whichever allocator says so."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:200]


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees
# ---------------------------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def table(title: str, rows: Sequence[Row]) -> Table:
    found, gaps = Table(title=title, title_justify="left", caption_justify="left"), list[str]()
    columns = ["", "GEMMs", "ms", "p10-p90", "x GEMMs", "extra MiB", "plan", "logp err", "dX err", "dW err"]
    resident = any(row.peak_rss_mib is not None for row in rows)
    if resident:
        columns.insert(6, "RSS")
    for name in columns:
        found.add_column(name, justify="right" if name else "left")
    gemms = next((row.ms_gemm for row in rows if row.ms_gemm is not None), None)
    if gemms is not None:
        found.add_row("bare GEMMs", str(GEMMS_OF[rows[0].op]), _number(gemms), "", "1.00")
    for row in rows:
        name = " ".join(
            part for part in (row.impl, row.backend, f"{row.budget_mib:.4g} MiB" if row.budget_mib else "") if part
        )
        if row.logits_dtype != row.dtype:
            name += f", {row.logits_dtype} logits"
        if row.ms_median is None:
            gaps.append(f"{name}: {row.status}: {row.note}" if row.note else f"{name}: {row.status}")
            continue
        found.add_row(
            name, _number(row.gemms, ".2g"), _number(row.ms_median), f"{row.ms_p10:.1f}-{row.ms_p90:.1f}",
            _number(row.ratio, ".2f"), _number(row.peak_extra_mib),
            *([_number(row.peak_rss_mib)] if resident else []), _number(row.plan_mib),
            *(_number(value, ".1e") for value in (row.logp_max_err, row.dx_rel_err, row.dw_rel_err)),
        )  # fmt: skip
    found.caption = "\n".join(gaps)
    return found


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


def console() -> Console:
    """Wide enough for the table where the output is a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=150, highlight=False)


def show_gates(gates: Sequence[Gate], screen: Console) -> None:
    found = Table(title="Gates", title_justify="left")
    for name in ("gate", "measured", "wanted", ""):
        found.add_column(name)
    for gate in gates:
        wanted = f"{'>=' if gate.at_least else '<='} {gate.limit:g}"
        found.add_row(gate.what, f"{gate.value:.3g}", wanted, "[green]pass" if gate.passed else "[red]FAIL")
    screen.print(found)
    screen.print(f"{sum(gate.passed for gate in gates)} of {len(gates)} gates pass")


def all_right(rows: Sequence[Row]) -> bool:
    """Whether fastpref is right wherever it was run: the exit code. A missed gate is a finding, not a failure."""
    return not any(row.impl == "fastpref" and row.status in ("wrong", "error") for row in rows)
