"""Common parts of the benchmarks: check, interleaved timing, peak memory, tables.

The protocol is in README.md; this file is where it happens.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastpref import release_workspaces

from .peers import MIB, Implementation, Result
from .problem import DTYPES, Batch, Shape, Truth, make_batch, relative
from .records import Row, clock_mhz, label

# The profiler, which counts CPU memory below, announces itself on stderr each time unless this is set before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

GEMMS_OF = {"forward": 1, "frozen": 2, "step": 3}

# What a result may be off by and still count as the right one. Not a measure of quality (the errors themselves are in
# the rows): bf16 logits of size 20 are rounded by 0.06.
LOGP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}  # nats: a token, or a sequence's mean
GRAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # relative Frobenius norm


# ---------------------------------------------------------------------------------------------------------------------
# A cell: one shape, dtype, op and loss
# ---------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    shape: Shape
    dtype: str
    op: str
    loss: str
    benchmark: str = "head"

    def row(self, implementation: Implementation, device: str) -> Row:
        """Still to be measured; "skipped" where no schedule fits its budget."""
        dtype = DTYPES[self.dtype]
        row = self.gap(implementation.name, "ok", "")
        row.version, row.backend = implementation.version, implementation.backend
        row.gemms = implementation.gemms(self.shape, self.op)
        row.logits_dtype = implementation.logits_dtype(dtype, device) if implementation.logits_dtype else self.dtype
        if implementation.plan is not None:
            try:
                plan = implementation.plan(self.shape, self.op, self.loss, dtype, device)
            except ValueError as error:  # the budget is below what any schedule needs
                row.status, row.note = "skipped", str(error)
                row.budget_mib = None if implementation.budget is None else implementation.budget / MIB
            else:
                row.budget_mib, row.plan_mib, row.gemms = plan.budget / MIB, plan.bytes / MIB, plan.gemms
        return row

    def gap(self, name: str, status: str, note: str) -> Row:
        """The row of an implementation that was not run."""
        s = self.shape
        return Row(
            name, self.op, self.loss, s.rows, s.hidden, s.vocab, self.dtype, status, note, logits_dtype=self.dtype,
            prompt_share=s.prompt_share, softcap=s.softcap, pairs=s.pairs, logits=s.logits, benchmark=self.benchmark,
        )

    def __str__(self) -> str:
        return f"{self.loss} {self.op}, {self.dtype}, {self.shape}"


GEMM_BYTES = 8 * 2**30  # of logits, and as much of residuals


class Gemms:
    """The bare GEMMs of an op into buffers that exist, in the inputs' dtype.

    Where N x V logits are beyond `most_bytes`: in equal blocks of rows, dW added up.
    """

    def __init__(self, batch: Batch, op: str, most_bytes: int = GEMM_BYTES) -> None:
        self.op, self.weight, self.x = op, batch.weight.detach(), batch.rows().detach().contiguous()
        vocab = batch.shape.vocab
        blocks = -(-len(self.x) * vocab * self.x.itemsize // most_bytes)
        self.blocks = self.x.chunk(blocks)
        first = self.blocks[0]
        self.logits = self.x.new_empty(len(first), vocab)
        if op != "forward":
            # Operands like the real ones: a GPU's clock depends on the bits that it multiplies.
            torch.mm(first, self.weight.t(), out=self.logits)
            self.residuals = torch.empty_like(self.logits)
            for rows, out in zip(self.logits.split(256), self.residuals.split(256)):
                out.copy_(torch.softmax(rows.float(), 1).neg_())
            self.dx = torch.empty_like(self.x)
        if op == "step":
            self.dw = torch.empty_like(self.weight)

    def __call__(self) -> None:
        done = 0
        for block in self.blocks:
            logits = self.logits[: len(block)]
            torch.mm(block, self.weight.t(), out=logits)
            if self.op != "forward":
                residuals = self.residuals[: len(block)]
                torch.mm(residuals, self.weight, out=self.dx[done : done + len(block)])
            if self.op == "step":
                torch.addmm(self.dw, residuals.t(), block, beta=float(done > 0), out=self.dw)
            done += len(block)


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
    release_workspaces()  # what fastpref keeps between calls counts as taken in each
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        start = time.perf_counter()
        result = call()
        milliseconds = (time.perf_counter() - start) * 1e3
        release_workspaces()
    now = peak = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Watched(result, peak - now, milliseconds)


def check(
    implementation: Implementation,
    batch: Batch,
    truth: Truth,
    op: str,
    loss: str,
    row: Row,
    tolerance: float = 1.0,
) -> float:
    """Runs it once, in ms; writes errors and memory into the row and marks it wrong if beyond the tolerance.

    tolerance: times the usual one.
    """
    prepare(batch, op)
    given = batch if implementation.references else batch.without_references()
    seen = watched(lambda: run(implementation, given, op, loss), batch.device)
    result, row.peak_extra_mib = seen.result, seen.extra_bytes / MIB
    expected = truth.gradients(loss, given)
    if result.active is not None and implementation.plan is not None:
        plan = implementation.plan(batch.shape, op, loss, batch.weight.dtype, batch.device.type)
        row.gemms = plan.gemms_at(result.active)
    logp_limit = tolerance * LOGP_TOLERANCE[batch.weight.dtype]
    grad_limit = tolerance * max(GRAD_TOLERANCE[batch.weight.dtype], implementation.grad_tolerance)
    wrong = []

    off = 0.0
    if result.logps is not None:
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
    loss_limit = tolerance * 1e-3 * (1 + abs(float(expected.loss))) + 2 * off * float(expected.logps.abs().sum())
    if not row.loss_err <= loss_limit:
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


def return_freed_memory() -> None:
    """Between cells and checks, and before an allocation that failed is tried again: the heap, which no longer shrinks
    by itself, keeps the gaps that every implementation leaves (N 1024, H 64, V 32000, half of it prompt: 2.4 GiB).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` things: each equally often in every place and after every other (Williams design)."""
    first = [0]
    for step in range(1, count):
        first.append((first[-1] + (step if step % 2 else -step)) % count)
    square = [[(place + shift) % count for place in first] for shift in range(count)]
    return square if count % 2 == 0 else [order for row in square for order in (row, row[::-1])]


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """On a CPU an allocation beyond what is free fails, where it else would wake the kernel's OOM killer."""
    free = free_bytes(device)
    if device.type != "cpu" or free is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    mine = status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (mine + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def status_bytes(name: str) -> int:
    """A field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated now; None where the system does not say. A container's own limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such files, or "max"
        pass
    return free


def l2_flush(device: torch.device) -> Callable[[], None]:
    """A call that leaves nothing of what was read or written before it in the L2 of a GPU."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * MIB)
    buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return lambda: None if buffer.zero_() is None else None


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
CLOCK_SECONDS = 0.2  # nvidia-smi takes about half of them to answer


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
    failed: Callable[[int, Exception], None] | None = None,
) -> list[dict[int, float]]:
    """For each contestant {round: ms}; every round runs all of them, in balanced order.

    slow: those that take part in `least` rounds only, spread evenly. deadline (time.monotonic): no further round begins
    after it, once there were `least`. failed: told of a contestant that raises, which takes part no more; None: raise.
    Out of memory counts only when the gaps that others left were given back.
    """
    watch, found = Stopwatch(device), [dict[int, float]() for _ in contestants]
    if device.type == "cuda":  # clocks fall while the host checks results
        until = time.monotonic() + WARM_SECONDS
        while time.monotonic() < until:
            contestants[0].call()
            torch.cuda.synchronize(device)
    orders = balanced_orders(len(contestants))
    out = set[int]()
    slow_rounds = {round(i * (rounds - 1) / max(1, least - 1)) for i in range(min(least, rounds))}
    for number in range(rounds):
        if number >= least and time.monotonic() > deadline:
            break
        taking_part = [i for i in orders[number % len(orders)] if not (slow and slow[i]) or number in slow_rounds]
        timed = []
        for i in taking_part:
            if i in out:
                continue
            try:
                milliseconds = _once(contestants[i], watch)
            except Exception as error:
                if failed is None:
                    raise
                failed(i, error)
                out.add(i)
                continue
            timed.append(i)
            if milliseconds is not None:
                found[i][number] = milliseconds
        if device.type == "cuda":
            for i, milliseconds in zip(timed, watch.read()):
                found[i][number] = milliseconds
    return found


def _once(contestant: Contestant, watch: Stopwatch) -> float | None:
    try:
        contestant.before()
        return watch.time(contestant.call)
    except Exception as error:
        if told(error)[0] != "oom":
            raise
    gc.collect()
    if watch.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()
    contestant.before()
    return watch.time(contestant.call)


def fill_times(row: Row, times: dict[int, float], limit: dict[int, float]) -> None:
    """limit: times of what the row is compared with, in the same rounds."""
    common = sorted(times.keys() & limit.keys())
    if not common:
        row.status, row.note = "skipped", "time budget"
        return
    row.ms_rounds = values = [times[number] for number in common]
    row.limit_ms_rounds = [limit[number] for number in common]
    row.rounds = len(values)
    row.ms_median = statistics.median(values)
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    row.ms_p10, row.ms_p90 = tenths[0], tenths[-1]
    row.ms_limit = statistics.median(row.limit_ms_rounds)
    row.ratio = statistics.median(times[number] / limit[number] for number in common)


_inputs: dict[tuple[Shape, torch.dtype, torch.device], tuple[Batch, Truth]] = {}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Batch, Truth]:
    """Cells of one shape follow each other: inputs and truth are made once, when the last ones are gone."""
    key = shape, dtype, device
    if key not in _inputs:
        _inputs.clear()
        if device.type == "cpu":
            return_freed_memory()
        batch = make_batch(shape, dtype, device)
        _inputs[key] = batch, Truth(batch)
    return _inputs[key]


SLOW = 2.5  # times the GEMMs: then fewer rounds tell as much


def measure(
    cell: Cell,
    implementations: Sequence[Implementation],
    device: torch.device,
    *,
    rounds: int,
    least: int = 3,
    deadline: float = math.inf,
    tolerance: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Checks every implementation, then times those that are right. What fails becomes a row, and the run goes on.

    tolerance: see `check`.
    """
    rows = [cell.row(implementation, device.type) for implementation in implementations]
    try:
        batch, truth = inputs(cell.shape, DTYPES[cell.dtype], device)
        say(f"  logits' standard deviation {truth.logits_std:.2f}, mean log-prob {truth.token_logps.mean():.2f}")
        gemms = Gemms(batch, cell.op)
        gemms()
        gemms_alone = watched(gemms, device).milliseconds
    except Exception as error:
        for row in rows:
            row.status, row.note = told(error)
        gc.collect()
        return rows

    def call(implementation: Implementation) -> Result:
        return run(implementation, batch, cell.op, cell.loss)

    alone = [0.0] * len(rows)
    for i, (row, implementation) in enumerate(zip(rows, implementations)):
        if row.status != "ok":
            pass
        elif cell.loss not in implementation.losses:
            row.status, row.note = "missing", f"has no {cell.loss}"
        elif time.monotonic() > deadline:
            row.status, row.note = "skipped", "time budget"
        else:
            try:
                alone[i] = check(implementation, batch, truth, cell.op, cell.loss, row, tolerance)
                if row.status == "ok" and device.type == "cuda":  # the first call compiled, tuned and loaded things
                    prepare(batch, cell.op)
                    warm = watched(partial(call, implementation), device)
                    row.peak_extra_mib, alone[i] = warm.extra_bytes / MIB, warm.milliseconds
            except NotImplementedError as error:
                row.status, row.note = "missing", str(error)
            except Exception as error:
                row.status, row.note = told(error)
            _cleared(batch, cell.op, failed=row.status in ("error", "oom"))
            say(f"  {implementation.label}: {row.status} {row.note}")

    running = [i for i, row in enumerate(rows) if row.status == "ok"]
    contestants = [Contestant(lambda: None, gemms)]
    contestants += [
        Contestant(partial(prepare, batch, cell.op), partial(call, implementations[i])) for i in running
    ]
    # What is compared from revision to revision takes part in every round, however slow.
    slow = [False, *(not rows[i].impl.startswith("fastpref") and alone[i] > SLOW * gemms_alone for i in running)]

    def failed(place: int, error: Exception) -> None:
        if place == 0:  # nothing to compare with
            raise error
        row = rows[running[place - 1]]
        row.status, row.note = told(error)
        _cleared(batch, cell.op, failed=True)

    try:
        gemm_times, *times = time_interleaved(
            contestants, rounds, device, slow=slow, deadline=deadline, least=least, failed=failed
        )
    except Exception as error:
        for i in running:
            rows[i].status, rows[i].note = told(error)
    else:
        clock = clock_under(gemms, device)
        for i, of_one in zip(running, times):
            if rows[i].status == "ok":
                fill_times(rows[i], of_one, gemm_times)
                rows[i].clock_mhz = clock
    prepare(batch, "forward")
    return rows


def _cleared(batch: Batch, op: str, *, failed: bool) -> None:
    """No gradients, no tensors held by a traceback, and no blocks cut to another one's sizes."""
    prepare(batch, op)
    if failed:
        gc.collect()
    if batch.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()


def clock_under(load: Callable[[], object], device: torch.device) -> float | None:
    """`clock_mhz` while a GPU computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        load()
        torch.cuda.synchronize(device)
        for _ in range(min(1000, math.ceil(CLOCK_SECONDS / (time.perf_counter() - start)))):
            load()
    return clock_mhz(device)


def told(error: BaseException) -> tuple[str, str]:
    """Status and note in one line; out of memory as such, whichever allocator says so."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return "oom", "out of memory"
    return "error", f"{type(error).__name__}: {text}"[:200]


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees
# ---------------------------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _share(ratio: float | None) -> str:
    """Of the limit's rate that is achieved."""
    return "" if not ratio else f"{1 / ratio:.0%}".replace("%", " %")


def table(title: str, rows: Sequence[Row], limit: str = "bare GEMMs") -> Table:
    """limit: what ratios are to."""
    found, gaps = Table(title=title, title_justify="left", caption_justify="left"), list[str]()
    columns = ["", "GEMMs", "ms", "p10-p90", "ratio", "share", "extra MiB", "plan", "logp err", "dX err", "dW err"]
    resident = any(row.peak_rss_mib is not None for row in rows)
    if resident:
        columns.insert(7, "RSS")
    if speeds := any(getattr(row, "tokens_per_s", None) for row in rows):
        columns.append("tokens/s")
    for name in columns:
        found.add_column(name, justify="right" if name else "left")
    ms_limit = next((row.ms_limit for row in rows if row.ms_limit is not None), None)
    if ms_limit is not None:
        found.add_row(limit, _number(float(GEMMS_OF[rows[0].op]), ".2g"), _number(ms_limit), "", "1.00", "100 %")
    for row in rows:
        name = label(asdict(row))
        if row.ms_median is None:
            gaps.append(f"{name}: {row.status}: {row.note}" if row.note else f"{name}: {row.status}")
            continue
        found.add_row(
            name, _number(row.gemms, ".2g"), _number(row.ms_median), f"{row.ms_p10:.1f}-{row.ms_p90:.1f}",
            _number(row.ratio, ".2f"), _share(row.ratio), _number(row.peak_extra_mib),
            *([_number(row.peak_rss_mib)] if resident else []), _number(row.plan_mib),
            *(_number(value, ".1e") for value in (row.logp_max_err, row.dx_rel_err, row.dw_rel_err)),
            *([_number(getattr(row, "tokens_per_s", None), ",.0f")] if speeds else []),
        )
    found.caption = "\n".join(gaps)
    return found


def console() -> Console:
    """Wide enough for the table where the output is a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=150, highlight=False)


def all_right(rows: Sequence[Row]) -> bool:
    """Whether fastpref is right wherever it was run: the exit code. A missed gate is a finding, not a failure."""
    return not any(row.impl.startswith("fastpref") and row.status in ("wrong", "error", "oom") for row in rows)
