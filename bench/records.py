"""Rows of the result: what is measured, where it comes from, and the JSON files that keep it.

A file is a JSON list with one row per implementation and cell, a row a line; each row also says where it comes from
(`environment`). Schema 2; `read` takes schema 1 (no rounds; the limit was called ms_gemm) too.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import torch

import fastpref
from fastpref.cpu import cpu_name

from .revision import output_of, revision

SCHEMA = 2


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
    status: str = "ok"  # "wrong": not timed; "oom"; "error", "missing", "skipped": see note; "planned": not run
    note: str = ""
    version: str = ""
    backend: str | None = None  # fastpref's row kernels
    logits_dtype: str = ""
    budget_mib: float | None = None
    prompt_share: float = 0.0
    softcap: float | None = None
    pairs: int = 0
    logits: str = "trained"  # how they are distributed: problem.LOGITS
    benchmark: str = "head"
    gemms: float | None = None  # GEMMs over N rows it does
    rounds: int = 0
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    ms_limit: float | None = None  # median of the limit (head: 3, 2 or 1 bare GEMMs by op) in the same rounds
    ratio: float | None = None  # median over rounds of time / time of the limit in that round
    ms_rounds: list[float] = field(default_factory=list)
    limit_ms_rounds: list[float] = field(default_factory=list)  # the limit in the same rounds
    clock_mhz: float | None = None  # right after the cell on a CPU (mean over its cores), under load on a GPU
    peak_extra_mib: float | None = None  # torch's allocator, beyond what is there after the call
    peak_rss_mib: float | None = None  # CPU: the process's high-water mark, likewise
    plan_mib: float | None = None
    logp_max_err: float | None = None  # nats, worst token; where only sequences are shown, worst sequence / its length
    logp_err_of: str = ""  # "token" or "sequence"
    dx_rel_err: float | None = None
    dw_rel_err: float | None = None
    loss_err: float | None = None


# What a row says of its machine and of its result. All other fields say what was asked for: they make up `identity`.
ENVIRONMENT = (
    "schema", "date", "device", "driver", "cpu", "threads", "python", "torch", "triton", "fastpref", "revision",
    "clocks", "freed_memory", "rounds_asked",
)
MEASURED = (
    "status", "note", "version", "gemms", "rounds", "ms_median", "ms_p10", "ms_p90", "ms_limit", "ratio", "ms_rounds",
    "limit_ms_rounds", "clock_mhz", "peak_extra_mib", "peak_rss_mib", "plan_mib", "logp_max_err", "logp_err_of",
    "dx_rel_err", "dw_rel_err", "loss_err", "u_rel_err", "gb_per_s", "tokens_per_s", "pairs_per_s",
    "speedup", "over_packed", "sent_mib", "mfu", "peak_mib", "reserved_mib", "grad_norm", "grad_norm_rel_err", "split",
)
CONTESTANT = ("impl", "backend", "logits_dtype", "budget_mib", "tokens")


def identity(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What was asked for: the same in two files where they measured the same thing."""
    return tuple(sorted((k, v) for k, v in row.items() if k not in ENVIRONMENT and k not in MEASURED))


def cell_of(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What the implementations of one table have in common."""
    return tuple(pair for pair in identity(row) if pair[0] not in CONTESTANT)


def on_gpu(row: dict[str, Any]) -> bool:
    return row["device"] != row["cpu"]


def label(row: dict[str, Any]) -> str:
    """The implementation, with what tells fastpref's rows apart."""
    budget, logits = row.get("budget_mib"), row.get("logits_dtype")
    name = " ".join(part for part in (row["impl"], row.get("backend"), f"{budget:.4g} MiB" if budget else "") if part)
    return name if not logits or logits == row["dtype"] else f"{name}, {logits} logits"


def read(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file of either schema, in the names of the newer one.

    Raises:
        ValueError: the file cannot be read or is no list of rows.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) and "impl" in row for row in found):
        raise ValueError(f"{path}: not a list of benchmark rows, as `fastpref bench ... --output` writes")
    if unknown := {row.get("schema") for row in found} - set(range(1, SCHEMA + 1)):
        raise ValueError(f"{path}: schema {', '.join(map(str, unknown))}; this version reads 1 to {SCHEMA}")
    newer = {"logits": "trained", "benchmark": "head", "ms_rounds": [], "limit_ms_rounds": []}
    for row in found:
        if row["schema"] == 1:
            row["ms_limit"] = row.pop("ms_gemm", None)
            if (row["status"], row["note"]) == ("error", "out of memory"):
                row["status"] = "oom"
        for name, value in newer.items():
            row.setdefault(name, value)
    return found


class Results:
    """Rows so far, on disk after every cell: an interrupted run keeps what it has, and `open` goes on from there."""

    def __init__(self, path: Path | None, device: torch.device, **conditions: object) -> None:
        self.path, self.environment, self.rows = path, environment(device) | conditions, list[Any]()
        self.earlier = dict[int, dict[str, Any]]()  # id of a row that was read: its own environment
        self.free = ("date", "clocks") + (("cpu", "threads", "driver") if device.type == "cuda" else ())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def open(
        cls, folder: Path | None, benchmark: str, device: torch.device, kind: type[Row] = Row, **conditions: object
    ) -> Results:
        """The file in `folder` that this machine, these versions and this revision began, else a new one.

        kind: of its rows. conditions: what else must be the same to go on, recorded in every row.
        """
        found = cls(None, device, **conditions)
        if folder is None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{slug(str(found.environment['device']), device)}-{benchmark}"
        known = {field.name for field in fields(kind)}
        for path in sorted(folder.glob(f"*-{name}*.json")):
            rows = read(path)
            if rows and all(row["benchmark"] == benchmark and found.same_place(row) for row in rows):
                found.path = path
                found.rows = [kind(**{name: row[name] for name in row.keys() & known}) for row in rows]
                places = ({name: row.get(name) for name in found.environment} for row in rows)
                found.earlier = {id(one): place for one, place in zip(found.rows, places)}
                return found
        date = str(found.environment["date"])[:10]
        names = (f"{date}-{name}{'' if number == 1 else f'-{number}'}.json" for number in count(1))
        found.path = next(folder / each for each in names if not (folder / each).exists())
        return found

    def same_place(self, row: dict[str, Any]) -> bool:
        """A GPU's host and driver may be others: each row keeps its own."""
        return all(row.get(name) == value for name, value in self.environment.items() if name not in self.free)

    def has(self, row: Row) -> bool:
        """Whether an earlier run has measured it, or found out that it cannot be."""
        wanted = identity(_plain(asdict(row)))
        for one in self.rows:
            if one.status != "skipped" and one.version == row.version and identity(_plain(asdict(one))) == wanted:
                return True
        return False

    def add(self, rows: Iterable[Any]) -> None:
        """Takes the place of what an earlier run had skipped."""
        new = list(rows)
        again = {identity(_plain(asdict(row))) for row in new}
        kept = [row for row in self.rows if identity(_plain(asdict(row))) not in again]
        self.earlier = {id(row): self.earlier[id(row)] for row in kept if id(row) in self.earlier}
        self.rows = kept + new
        if self.path is not None:
            partial = self.path.with_suffix(self.path.suffix + ".partial")
            places = (self.earlier.get(id(row), self.environment) for row in self.rows)
            partial.write_text(as_json([place | asdict(row) for place, row in zip(places, self.rows)]))
            os.replace(partial, self.path)


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(" " + json.dumps(_plain(row)) for row in rows) + "\n]\n"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Six digits; JSON has no inf and no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)

    return {name: plain(value) for name, value in row.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Where a row comes from
# ---------------------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, object]:
    """What a row must say about where it comes from."""
    cuda = device.type == "cuda"
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "driver": _smi(device, "driver_version") if cuda else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastpref": fastpref.__version__,
        "revision": revision(),
        "clocks": _clocks(device),
    }


def slug(name: str, device: torch.device) -> str:
    """Of a device, for file names: "nvidia-h200", "amd-epyc-no-amx-2-cores" (threads that compute)."""
    found = "-".join(re.findall(r"[a-z0-9]+", name.lower()))
    return found if device.type == "cuda" else f"{found}-{torch.get_num_threads()}-cores"


def clock_mhz(device: torch.device) -> float | None:
    """Of the multiprocessors now, or of the CPU's cores on average; None where the system does not say."""
    if device.type == "cuda":
        found = _smi(device, "clocks.sm")
        return float(found) if found and found.replace(".", "").isdigit() else None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _clocks(device: torch.device) -> str | None:
    if device.type != "cuda":
        mhz = clock_mhz(device)
        return f"{mhz:.0f} MHz" if mhz else None
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    return ", ".join(f"{name} {_smi(device, name) or '?'}" for name in names)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi(device: torch.device, field: str) -> str | None:
    # Its own numbering ignores CUDA_VISIBLE_DEVICES; a uuid does not. torch leaves the prefix out.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = () if uuid is None else ("-i", f"GPU-{str(uuid).removeprefix('GPU-')}")
    found = output_of("nvidia-smi", *which, f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return found.splitlines()[0].strip() if found else None
