"""What became faster or slower from one result file to another, beyond the noise.

    fastpref bench compare before.json after.json [--threshold 0.05]

Rows are paired by what was asked for; every time is first divided by the limit's in its own round, so that clocks and
neighbours cancel. The factor is the ratio of the two medians, its 95 % interval a bootstrap over rounds (of fewer than
five rounds: from extreme to extreme). Exits with 1 if a time that is beyond its noise, or memory, grew by more than the
threshold, or if something that worked does not any more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from .harness import console
from .records import identity, label, read

RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_ROUNDS = 5  # for a bootstrap
SHOWN = ("torch", "triton", "driver", "threads", "freed_memory", "fastpref", "revision")


@dataclass(frozen=True)
class Change:
    """A factor above 1: slower, or more memory. low and high are NaN where a file has no rounds (schema 1)."""

    row: dict[str, Any]
    what: str  # "time", "memory" or "status"
    before: float | str
    after: float | str
    factor: float = math.nan
    low: float = math.nan
    high: float = math.nan
    threshold: float = 0.05

    @property
    def verdict(self) -> str:
        if self.what == "status":
            return "broke" if self.before == "ok" else "works now" if self.after == "ok" else "same"
        if math.isnan(self.low):
            return "no rounds"
        if self.low <= 1 <= self.high:
            return "same"
        better, worse = ("less", "more") if self.what == "memory" else ("faster", "slower")
        return worse if self.factor > 1 else better

    @property
    def regressed(self) -> bool:
        grown = self.verdict in ("slower", "more") and self.factor > 1 + self.threshold
        return grown or self.verdict == "broke"


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap of median(after) / median(before), both resampled independently; fixed seed."""
    a, b = np.asarray(before), np.asarray(after)
    if min(len(a), len(b)) < LEAST_ROUNDS:
        return float(b.min() / a.max()), float(b.max() / a.min())
    gen = np.random.default_rng(0)
    medians = [np.median(gen.choice(each, (RESAMPLES, len(each))), axis=1) for each in (a, b)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians[1] / medians[0], (tail, 1 - tail))
    return float(low), float(high)


def relative_times(row: dict[str, Any]) -> list[float]:
    """Of every round, to the limit in that round; milliseconds where there is no limit."""
    limits = row["limit_ms_rounds"] or [1.0] * len(row["ms_rounds"])
    return [ms / limit for ms, limit in zip(row["ms_rounds"], limits)]


def changes(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], threshold: float
) -> tuple[list[Change], list[str], list[str]]:
    """Changes of what both have; what only the first has and what only the second has."""
    old, new = ({identity(row): row for row in rows} for rows in (before, after))
    found = []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        if "ok" not in (a["status"], b["status"]) or {"skipped", "missing"} & {a["status"], b["status"]}:
            continue
        if a["status"] != b["status"]:
            found.append(Change(b, "status", a["status"], b["status"], threshold=threshold))
            continue
        if a["ms_median"] and b["ms_median"]:
            if a["ms_rounds"] and b["ms_rounds"]:
                times = relative_times(a), relative_times(b)
                factor = float(np.median(times[1]) / np.median(times[0]))
                low, high = interval(*times)
            else:
                factor = (b["ratio"] or b["ms_median"]) / (a["ratio"] or a["ms_median"])
                low = high = math.nan
            found.append(Change(b, "time", a["ms_median"], b["ms_median"], factor, low, high, threshold))
        if a.get("peak_extra_mib") and b.get("peak_extra_mib"):
            was, now = a["peak_extra_mib"], b["peak_extra_mib"]
            factor = now / was  # counted, not sampled: it has no noise
            found.append(Change(b, "memory", was, now, factor, factor, factor, threshold))
    order = {key: number for number, key in enumerate(new)}
    found.sort(key=lambda change: (order[identity(change.row)], change.what != "time"))
    gone, added = ([_name(one[key]) for key in one if key not in two] for one, two in ((old, new), (new, old)))
    return found, gone, added


def _name(row: dict[str, Any]) -> str:
    sizes = [f"{name} {row[name]}" for name in ("N", "H", "V") if row.get(name)]
    words = [row["benchmark"], row.get("loss"), row.get("op"), row["dtype"], *sizes]
    words += [f"{row['prompt_share']:.0%} prompt" if row.get("prompt_share") else "", row.get("l2"), row.get("model")]
    words += [f"{row['logits']} logits" if row["logits"] != "trained" else ""]
    return f"{label(row)}: " + ", ".join(str(word) for word in words if word)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpref bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--threshold", type=float, default=0.05, help="growth that is a regression; default: 0.05")
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:
        raise ValueError(f"--threshold is {options.threshold}; it takes a number >= 0")
    before, after = read(options.before), read(options.after)
    devices = [{row["device"] for row in rows} for rows in (before, after)]
    if devices[0] != devices[1]:
        names = [", ".join(sorted(map(str, each))) or "nothing" for each in devices]
        raise ValueError(f"{options.before} is of {names[0]}, {options.after} of {names[1]}; it takes one device's")
    screen = console()
    for name in SHOWN:
        was, now = (sorted({str(row.get(name)) for row in rows}) for rows in (before, after))
        if was != now:
            screen.print(f"{name}: {', '.join(was)} -> {', '.join(now)}", markup=False, soft_wrap=True)
    found, gone, added = changes(before, after, options.threshold)
    for title, names in (("only before", gone), ("only after", added)):
        for name in names:
            screen.print(f"{title}: {name}", markup=False, soft_wrap=True)
    if not found:
        raise ValueError("the two files have no measurement in common")
    table = Table(title=f"{options.before} -> {options.after}", title_justify="left")
    for column in ("", "", "before", "after", "factor", "95 % interval", ""):
        table.add_column(column, overflow="fold")
    for change in found:
        if change.verdict == "same" and change.what != "time":
            continue
        ends = [end if isinstance(end, str) else f"{end:.4g}" for end in (change.before, change.after)]
        factor = "" if math.isnan(change.factor) else f"{change.factor:.3f}"
        noise = "" if math.isnan(change.low) or change.what != "time" else f"{change.low:.3f}-{change.high:.3f}"
        colour = "red" if change.regressed else "green" if change.verdict in ("faster", "less", "works now") else ""
        verdict = f"[{colour}]{change.verdict}" if colour else change.verdict
        unit = {"time": "ms", "memory": "MiB", "status": "status"}[change.what]
        table.add_row(_name(change.row), unit, *ends, factor, noise, verdict)
    screen.print(table)
    regressed = sum(change.regressed for change in found)
    screen.print(f"comparisons: {len(found)}, regressions beyond {options.threshold:.0%}: {regressed}")
    return int(regressed > 0)
