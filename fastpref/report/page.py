"""The report of a run: metrics.jsonl, summary.json and config.yaml become one self-contained report.html.

Reads only files, so a report can be made again at any time, also of a run that was killed; what they lack is left out.
The page is templates/run.html. Nothing in it is fetched and nothing runs: its Content-Security-Policy forbids both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastpref.files import write_text

from .charts import Line, Point, change_chart, line_chart, spread
from .frontier import Measured, best_of, best_sentence, frontier, implicit_frontier
from .metrics import metric, number, percent, without_ties
from .reading import Row, Run, Stage, as_row, flat, is_number, read_run
from .render import render
from .verdict import EXTREMES, Verdict, link_of, verdict_of

MOST_EVALUATIONS = 40

Pairs = dict[str, tuple[float | None, float]]  # metric -> before, after


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` (atomically, replacing an older one) and returns its path.

    Needs run_dir/metrics.jsonl; config.yaml and summary.json add what they hold.
    Raises UserError if there is no metrics.jsonl. Values that are missing, NaN or infinite, and lines that are
    not JSON (a killed run may leave half a line), are left out and counted in the report, never an error.
    """
    run = read_run(Path(run_dir))
    pairs, verdict = _before_and_after(run), verdict_of(run)
    path = Path(run_dir) / "report.html"
    made_by = {"device": run.summary.get("device"), **as_row(run.summary.get("versions"))}
    matches = [(stage.name, points) for stage in run.stages if (points := stage.series("eval", "exact_match"))]
    write_text(path, render(
        "run.html", title=f"{run.name} · fastpref run", run=run, cards=_headlines(run, pairs, verdict),
        verdict=verdict, link=link_of(verdict, path.parent), tasks=_tasks(run, pairs),
        matches=matches, best={stage.name: _best(run, stage) for stage in run.stages},
        stages=[_stage(stage, run) for stage in run.stages], config=run.config_text.rstrip(),
        made_by={name: value for name, value in made_by.items() if value is not None},
    ))
    return path


# ---- numbers -------------------------------------------------------------------------------------------------------


def _smooth(points: Sequence[Point]) -> tuple[list[Point], int]:
    """Centred running mean (no lag; one-sided at the ends) over about 1/25 of the run; and its width in points."""
    half = min(max(len(points) // 50, 2 if len(points) >= 20 else 0), 50)
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        first, end = max(0, i - half), min(len(points), i + half + 1)
        smoothed.append((x, (total[end] - total[first]) / (end - first)))
    return smoothed, 2 * half + 1


def _before_and_after(run: Run) -> Pairs:
    """Name -> (before, after) the last stage that was evaluated twice: summary.json's values, else the evaluations'.

    Reward accuracy has no before where the policy started as its own reference.
    """
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for stage in run.stages:
        rows = stage.rows("eval")
        if len(rows) >= 2:
            before, after = flat(rows[0]), flat(rows[-1])
    for name, ends in (("before", before), ("after", after)):
        if isinstance(run.summary.get(name), dict):
            ends |= flat(without_ties(run.summary[name]))
    return {key: (before.get(key), after[key]) for key in after if key in before or key == "rewards/accuracies"}


# ---- charts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One chart of a stage: the metrics it draws, its title (the metric's, if there is none here), and the axis."""

    keys: tuple[str, ...]
    y_label: str
    title: str = ""
    guide: tuple[float, str] | None = None
    best: bool = False  # name the best held-out value
    total: str = "ends"  # how the sentence sums up: from start to end; "median" and "peak" for machine figures


_LENGTH = Panel(("watch/length_correlation",), "of the margin with |chosen| − |rejected|, over pairs",
                guide=(0.0, "no relation"))
LEARNING = (
    Panel(("loss",), "loss", best=True),
    Panel(("logps/chosen", "logps/rejected"), "log-prob, nats per response", "Log-probabilities of the responses"),
    Panel(("logps/chosen",), "log-prob, nats per response", "Chosen log-prob on its own scale"),
    Panel(("rewards/chosen", "rewards/rejected"), "β · (log-prob − reference log-prob), nats", "Implicit rewards",
          guide=(0.0, "as the reference")),
    Panel(("rewards/margins",), "chosen − rejected reward, nats", guide=(0.0, "no preference")),
    Panel(("rewards/accuracies",), "pairs with the chosen response ahead", guide=(0.5, "chance"), best=True),
    Panel(("exact_match",), "held-out prompts", "Exact match of greedy generations", best=True),
)
WATCH = (
    Panel(("watch/chosen_change", "watch/rejected_change"), "log-prob − its start, nats per response",
          "Log-probabilities since the start", guide=(0.0, "as at the start")),
    Panel(("watch/chosen_fell",), "pairs with a chosen log-prob below its start", "Chosen log-prob fell"),
    _LENGTH,
    Panel(("watch/kl",), "k3 of the responses' log-ratios, nats per response",
          "KL to the reference, on the data's responses", guide=(0.0, "as the reference")),
)
REWARD_MODEL = (
    LEARNING[0],
    Panel(("accuracy",), "pairs with the larger reward for the chosen response", guide=(0.5, "chance"), best=True),
    Panel(("rewards/chosen", "rewards/rejected"), "reward of a response", "Rewards"),
    Panel(("margin",), "chosen − rejected reward", guide=(0.0, "no preference")),
    Panel(("mean_reward",), "reward of a response, chosen and rejected alike", guide=(0.0, "0")),
    _LENGTH,
)
MACHINE = (
    Panel(("tokens_per_s",), "tokens per second", total="median"),
    Panel(("peak_memory_mib",), "MiB", total="peak"),
    Panel(("learning_rate",), "learning rate", total="peak"),
    Panel(("grad_norm",), "norm before clipping", total="median"),
)


def _panels(panels: Sequence[Panel], stage: Stage) -> list[Markup]:
    return [chart for panel in panels if (chart := _panel(panel, stage))]


def _panel(panel: Panel, stage: Stage) -> Markup:
    pair = len(panel.keys) == 2
    if pair and not all(stage.series("train", key) or stage.series("eval", key) for key in panel.keys):
        return Markup()
    lines: list[Line] = []
    notes: list[str] = []
    width = 1
    for key in panel.keys:
        side = key.rsplit("/", 1)[-1].split("_")[0] if pair else ""  # chosen or rejected
        name = f"{side}, " if pair else ""
        raw, measured = stage.series("train", key), stage.series("eval", key)
        smooth, this_width = (raw, 1) if panel.total == "peak" else _smooth(raw)  # a schedule has its corners
        width = max(width, this_width)
        if this_width > 1 and not pair:
            lines.append(Line("", raw, "train", "trace"))
        lines.append(Line(name + "training", smooth, side or "train", "pale" if measured else "line"))
        lines.append(Line(name + "held-out", measured, side or "eval", "marked"))
        notes.append(_sentence(panel, key, stage, name))
    ends = panel.total == "ends"
    if width > 1 and ends:
        notes.append(f"Training lines are running means of {width} logged values.")
    return line_chart(
        panel.title or metric(panel.keys[0]).title, lines, y_label=panel.y_label, note=" ".join(filter(None, notes)),
        shares=metric(panel.keys[0]).share, from_zero=not ends, guide=panel.guide, size="large" if ends else "small",
    )


def _sentence(panel: Panel, key: str, stage: Stage, name: str) -> str:
    """The figures of a chart in words, for those who cannot see it and for those in a hurry."""
    about = metric(key)
    show: Callable[[float], str] = percent if about.share else number
    if panel.total != "ends":
        values = [y for _, y in stage.series("train", key)]
        if not values:
            return ""
        value = statistics.median(values) if panel.total == "median" else max(values)
        return f"{panel.total.capitalize()} {show(value)} {about.unit}".rstrip() + "."
    held_out, ends = stage.series("eval", key), stage.ends(key)
    if len(held_out) == 1:
        return f"{(name + 'held-out').capitalize()}: {show(held_out[0][1])} at step {number(held_out[0][0], 8)}."
    if ends is None:
        return ""
    start, end, basis = ends
    words = f"{(name + basis).capitalize()}: {show(start)} → {show(end)}"
    if panel.best and basis == "held-out":
        best, word = (min, "lowest") if about.better == "lower" else (max, "highest")
        step, value = best(held_out, key=lambda point: point[1])
        if value != end:
            words += f"; {word} {show(value)} at step {number(step, 8)}"
    return words + "."


# ---- the words on top ----------------------------------------------------------------------------------------------

HEADLINES = ("exact_match", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "mean_reward",
             "logps/chosen", "logps/rejected", "watch/kl", "loss")


def _headlines(run: Run, pairs: Pairs, verdict: Verdict) -> list[Row]:
    """No figure that the loss raises is called better where the verdict says that this is no news."""
    bad = verdict.extreme or verdict.kind in ("broken", "over-optimised")
    cards: list[Row] = []
    for key in HEADLINES:
        if key in pairs:
            before, after = pairs[key]
            about = metric(key)
            show = percent if about.share else partial(number, digits=4)
            card = change_card(about.title, before, after, show, about.better, f"before {run.last}")
            if bad and key in EXTREMES and card.get("mood") == "better":
                card["mood"] = ""
            cards.append(card)
    for key in ("tokens_per_s", "peak_memory_mib"):
        value = run.summary.get(key)
        if not is_number(value):
            values = [y for stage in run.stages for _, y in stage.series("train", key)]
            value = (max(values) if key == "peak_memory_mib" else statistics.median(values)) if values else None
        if value is not None:
            seconds = run.summary.get("seconds")
            cards.append({
                "label": metric(key).title, "value": number(value, 4), "unit": metric(key).unit,
                "was": f"{_duration(seconds)} in all" if key == "tokens_per_s" and is_number(seconds) else "",
            })
    return cards


def change_card(label: str, before: float | None, after: float, show: Callable[[float], str], better: str,
                was: str, error: float = 0.0) -> Row:
    """A figure, what it was before, and whether that is for the better: not said of less than two standard errors of
    the change. before None: there was nothing to compare."""
    if before is None:
        return {"label": label, "value": show(after), "was": f"{was}: all tied"}
    change = after - before
    arrow = "▲" if change > 0 else "▼" if change < 0 else "="
    amount = f"{abs(100 * change):.1f} points" if show is percent else number(abs(change))
    if error:
        amount += f" ± {number(error, 2)}"
    known = better and change and abs(change) >= 2 * error
    mood = "" if not known else "better" if (change > 0) == (better == "higher") else "worse"
    return {"label": label, "value": show(after), "change": f"{arrow} {amount}", "mood": mood,
            "was": f"{was}: {show(before)}"}


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _best(run: Run, stage: Stage) -> str:
    points = _measured(stage, "sample", "reward")
    return best_sentence(points, _place_of_best(run, stage, points)) if points else ""


def _place_of_best(run: Run, stage: Stage, points: Sequence[Measured]) -> str:
    return run.place_of(stage, best_of(points).step) or "no checkpoint was saved there"


def _measured(stage: Stage, split: str, reward: str) -> list[Measured]:
    """Where both KL and reward are known: scored samples, or evaluations with their margins for a reward."""
    kl = "kl" if split == "sample" else "watch/kl"
    return [
        Measured(row["step"], row[kl], row[reward], row.get(f"{reward}_error"))
        for row in stage.rows(split)
        if is_number(row.get(kl)) and is_number(row.get(reward))
    ]


# ---- the parts of the page -------------------------------------------------------------------------------------------


def _watch(run: Run, stage: Stage) -> list[Markup]:
    """The charts of the watch on over-optimisation."""
    points, rows = _measured(stage, "sample", "reward"), stage.rows("sample")
    estimators = [
        Line(label, stage.series("sample", key), role, "marked",
             [row.get(f"{key}_error") or 0.0 for row in rows if is_number(row.get(key))])
        for key, label, role in (("kl_k1", "k1", "train"), ("kl_k3", "k3", "eval"))
    ]
    note = ""
    if rows:
        shares = stage.series("sample", "time_share")
        cost = f" They took {percent(shares[-1][1])} of the training time." if shares else ""
        k1, k3, samples = (number(rows[-1].get(key)) for key in ("kl_k1", "kl_k3", "samples"))
        note = (f"{len(rows)} times {samples} responses; the last: {k3} nats by k3, {k1} by k1. "
                f"Bars are standard errors; k3 is the better one up to about 0.25 nats a token, k1 beyond.{cost}")
    fresh = line_chart("KL to the reference, on fresh samples", estimators, y_label="nats per response", note=note,
                       guide=(0.0, "as the reference"))
    reward = (frontier(points, _place_of_best(run, stage, points)) if points
              else implicit_frontier(_measured(stage, "eval", "rewards/margins")))
    return [*_panels(WATCH, stage), *filter(None, (fresh, reward))]


def _tasks(run: Run, pairs: Pairs) -> Markup:
    rows = [
        (key.split("/", 1)[1], before, after)
        for key, (before, after) in sorted(pairs.items())
        if key.startswith("exact_match/") and before is not None
    ]
    note = f"{sum(after > before for _, before, after in rows)} of {len(rows)} tasks improved."
    return change_chart(f"Exact match by task, before and after {run.last}", rows, note=note)


def _stage(stage: Stage, run: Run) -> Row:
    rewarded = any(stage.series(split, "mean_reward") for split in stage.splits)
    return {
        "name": stage.name,
        "facts": ", ".join(_stage_facts(stage, run)),
        "learning": _panels(REWARD_MODEL if rewarded else LEARNING, stage),
        "watch": [] if rewarded else _watch(run, stage),
        "machine": _panels(MACHINE, stage),
        "evaluations": _evaluations(stage.rows("eval")),
        "developed": run.developed(stage),
    }


def _stage_facts(stage: Stage, run: Run) -> list[str]:
    facts = [f"{key} {value}" for key, value in _settings(stage.name, run.config).items()]
    train = stage.rows("train")
    if train:
        facts.append(f"{number(train[-1]['step'], 8)} optimiser steps")
        if is_number(train[-1].get("epoch")):
            facts.append(f"{number(train[-1]['epoch'])} epochs")
    if stage.rows("eval"):
        facts.append(f"{len(stage.rows('eval'))} evaluations")
    cost = flat(stage.history)
    if "num_tokens" in cost and "seconds" in cost:
        facts.append(f"{number(cost['num_tokens'])} tokens in {_duration(cost['seconds'])}")
    if cost.get("skipped_steps"):
        facts.append(f"{number(cost['skipped_steps'])} steps skipped for NaN or infinite gradients")
    return facts


def _settings(stage: str, config: Row) -> Row:
    """What a stage was run with, of the keys that people compare: its own where it sets them, else the run's."""
    sections = config.get("stages")
    for section in sections if isinstance(sections, list) else ():
        if isinstance(section, dict) and stage in (section.get("name"), section.get("loss")):
            config = config | section
    keys = ("loss", "beta", "eta", "center_coefficient", "learning_rate", "per_device_train_batch_size",
            "max_tokens_per_batch", "gradient_accumulation_steps")
    return {key: config[key] for key in keys if isinstance(config.get(key), (str, int, float))}


def _evaluations(rows: list[Row]) -> Row:
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value)))
    keys = [key for key in keys if not key.startswith("exact_match/")]  # the tasks have a chart
    shown = spread(rows, MOST_EVALUATIONS)

    def cell(key: str, value: Any) -> str:
        return "" if not is_number(value) else percent(value) if metric(key).share else number(value, 4)

    return {
        "title": f"{'All' if len(shown) == len(rows) else f'{len(shown)} of'} {len(rows)} evaluations",
        "heads": [(key, metric(key).what) for key in keys],
        "rows": [[cell(key, row.get(key)) for key in keys] for row in shown],
    }
