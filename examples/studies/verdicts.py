"""How often the verdict of a run (fastpref/report/verdict.py) calls the peak rightly, on the frontier study's curves.

    python examples/studies/verdicts.py

A point of a curve is past the peak where its gold reward is below the best so far by a tenth of what was won there. The
verdict sees the curve up to that point, three ways: the gold reward itself; the gold reward of 128 samples (noise of
standard deviation 1 / sqrt(128): the gold reward has unit variance under the reference) with its standard error; and no
reward at all, but what every run knows: KL and the chosen log-prob. Writes results/verdicts.json and the table in
docs/watch.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import frontier  # noqa: E402
import study  # noqa: E402

from fastpref.report.verdict import Evidence, Gold, judge  # noqa: E402

SAMPLES, DRAWS = 128, 3  # draws of the noise
WAYS = {
    "exact": "reward, exact", "sampled": f"reward of {SAMPLES} samples",
    "none": "no reward, only KL and chosen log-prob"}
PAGE = study.ROOT / "docs" / "watch.md"


def past_peak(gold: list[float]) -> list[bool]:
    best = np.maximum.accumulate(gold)
    return [bool(value < top - 0.1 * top) for value, top in zip(gold, best)]


def called(curve: dict[str, list[float]], at: int, start: float, way: str, noise: np.ndarray) -> bool:
    """Whether the verdict on the curve up to `at` is over-optimised. start: the chosen responses' log-prob."""
    error = 0.0 if way == "exact" else SAMPLES**-0.5
    points = [(float(k), curve["gold"][k] + error * noise[k], error) for k in range(at + 1)]
    seen = Evidence(golds=[] if way == "none" else [Gold("reward", points)], kl=curve["kl"][at], tokens=4.0,
                    chosen=(start, start + curve["chosen"][at]))
    return judge(seen).kind == "over-optimised"


def counts(record: dict[str, Any], starts: dict[str, float], ways: Iterable[str] = WAYS) -> dict[str, Any]:
    """way -> where -> [past and called, past and not, not past and called, not past and not]; and how many points after
    the first one past the peak the first call comes, the median of the runs that are past it at the end."""
    found: dict[str, Any] = {}
    for way in ways:
        ends, everywhere, late = np.zeros(4, int), np.zeros(4, int), []
        rng = np.random.default_rng(0)
        for seed, losses in record["results"].items():
            for curve in (curve for betas in losses.values() for curve in betas.values()):
                past = past_peak(curve["gold"])
                for _ in range(DRAWS if way == "sampled" else 1):
                    noise = rng.standard_normal(len(past))
                    calls = [called(curve, at, starts[seed], way, noise) for at in range(1, len(past))]
                    for at, call in enumerate(calls, 1):
                        everywhere[2 * (not past[at]) + (not call)] += 1
                    ends[2 * (not past[-1]) + (not calls[-1])] += 1
                    if past[-1]:
                        late.append(calls.index(True) + 1 - past.index(True) if True in calls else math.inf)
        found[way] = {"end": ends.tolist(), "points": everywhere.tolist(), "late": float(np.median(late))}
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| what is known | past the peak at the end: called | not past it: called | right at the end | "
             "right at every point | first call, measurements after the peak was passed (median) |",
             "|---|---|---|---|---|---|"]
    for way, title in WAYS.items():
        (a, b, c, d), points = found[way]["end"], found[way]["points"]
        late, right = found[way]["late"], (points[0] + points[3]) / sum(points)
        lines.append(f"| {title} | {a / (a + b):.0%} of {a + b} | {c / (c + d):.0%} of {c + d} | "
                     f"{(a + d) / (a + b + c + d):.0%} | {right:.0%} of {sum(points):,} | "
                     f"{'never' if math.isinf(late) else f'{late:+.0f}'} |")
    return "\n".join(lines)


def main() -> None:
    record = json.loads((study.RESULTS / "frontier.json").read_text())
    starts = {}
    for seed in record["seeds"]:
        world = frontier.make_world(seed, record["settings"])
        starts[str(seed)] = study.significant(float(world.space.totals(world.reference)[world.chosen].mean()), 5)
    found = counts(record, starts)
    study._write(study.RESULTS / "verdicts.json", json.dumps({"starts": starts, "counts": found}, indent=1) + "\n")
    study.write_section(PAGE, "verdicts", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
