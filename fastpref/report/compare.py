"""Several runs in one page: their verdicts, what their configurations differ in, and their curves over each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastpref.errors import UserError
from fastpref.files import write_text

from .charts import Line, line_chart
from .metrics import metric, number, percent
from .reading import Run, read_run
from .render import render
from .verdict import verdict_of

MOST = 8  # runs: more colours and dashes are not told apart
# (key, axis, value of a horizontal guide)
CURVES = (("loss", "loss", None), ("exact_match", "held-out prompts", None),
          ("rewards/accuracies", "pairs with the chosen response ahead", (0.5, "chance")),
          ("rewards/margins", "chosen − rejected reward, nats", None), ("watch/kl", "nats per response", None),
          ("logps/chosen", "log-prob, nats per response", None),
          ("watch/chosen_change", "log-prob − its start, nats per response", (0.0, "as at the start")))
OWN = ("output_dir", "overwrite_output_dir", "reference_dir", "report_to")  # differ from run to run, and say nothing


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Writes the page of these runs to `path` (atomically) and returns it.

    Raises UserError for fewer than two runs, more than MOST, and a folder without metrics.jsonl.
    """
    if not 2 <= len(folders) <= MOST:
        raise UserError(f"compare takes 2 to {MOST} runs; got {len(folders)}")
    runs = [read_run(Path(folder)) for folder in folders]
    names = _names([Path(folder).resolve() for folder in folders])
    path = Path(path)
    shown = [{"name": name, "verdict": verdict_of(run)} for name, run in zip(names, runs)]
    write_text(path, render(
        "compare.html", title=f"{len(runs)} runs · fastpref", runs=shown,
        keys=_differences(runs), ends=_ends(runs), charts=_charts(runs, names)))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """As much of their paths as tells them apart."""
    for parts in range(1, 5):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all of them."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key not in OWN)
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    items = config.items() if isinstance(config, dict) else enumerate(config)
    found = []
    for key, value in items:
        if isinstance(value, dict) or isinstance(value, list) and any(isinstance(part, dict) for part in value):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return found


def _series(run: Run, key: str) -> list[tuple[float, float]]:
    """Held-out where there is such, of the run's last stage; else of training."""
    stage = run.stages[-1] if run.stages else None
    return (stage.series("eval", key) or stage.series("train", key)) if stage else []


def _ends(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A row a metric: where each run ended."""
    rows = []
    for key, _, _ in CURVES:
        ends = [series[-1][1] if (series := _series(run, key)) else None for run in runs]
        if any(end is not None for end in ends):
            show = percent if metric(key).share else number
            rows.append((metric(key).title, ["" if end is None else show(end) for end in ends]))
    return rows


def _charts(runs: Sequence[Run], names: Sequence[str]) -> list[Markup]:
    found = []
    broken = [name for name, run in zip(names, runs) if verdict_of(run).kind == "broken"]
    broken = broken if len(broken) < len(runs) else []  # its numbers would flatten all others
    note = f"Left out, for it broke: {', '.join(broken)}." if broken else ""
    for key, axis, guide in CURVES:
        lines = [Line(name, _series(run, key), f"run{i}", "marked" if len(_series(run, key)) <= 40 else "line")
                 for i, (name, run) in enumerate(zip(names, runs)) if name not in broken]
        found.append(line_chart(metric(key).title, lines, y_label=axis, guide=guide, shares=metric(key).share,
                                note=note))
    rewards = [Line(name, [(row["kl"] ** 0.5, row["reward"]) for row in run.stages[-1].rows("sample")
                           if row.get("reward") is not None and (row.get("kl") or -1) >= 0], f"run{i}", "points")
               for i, (name, run) in enumerate(zip(names, runs)) if run.stages]
    found.append(line_chart("Reward of fresh samples against √KL", rewards, y_label="mean reward",
                            x_label="√KL to the reference, √nats", x_name="√KL"))
    return [chart for chart in found if chart]
