"""The report of a run: metrics.jsonl, summary.json and config.yaml become one self-contained report.html.

Reads only files, never the trainer's state, so a report can be made again at any time, also of a run that was killed.
Nothing in it is fetched and nothing runs: its Content-Security-Policy forbids both, and every text is escaped.

metrics.jsonl: one JSON object a line, {"stage", "split": "train" | "eval", "step", ...values}. What a line or a
file lacks, the report leaves out; where a resumed run repeats a step, the later line counts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fastpref.errors import UserError
from fastpref.files import write_text

from .chart import Line, Point, change_chart, line_chart, number, percent, spread
from .frontier import Measured, best_of, best_sentence, frontier, implicit_frontier

Row = dict[str, Any]

MOST_SAMPLES, MOST_SAMPLE_CHARS, MOST_CONFIG_CHARS, MOST_EVALUATIONS = 12, 1200, 40_000, 40


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` (atomically, replacing an older one) and returns its path.

    Needs run_dir/metrics.jsonl; config.yaml and summary.json add what they hold.
    Raises UserError if there is no metrics.jsonl. Values that are missing, NaN or infinite, and lines that are
    not JSON (a killed run may leave half a line), are left out and counted in the report, never an error.
    """
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"run_dir: no metrics.jsonl in {run_dir}; expected the folder of a training run")
    run = _read_run(run_dir)
    path = run_dir / "report.html"
    write_text(path, _page(run))
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the files of a run say. `stages`: name -> split -> rows, one row a step, in the order of training."""

    name: str
    stages: dict[str, dict[str, list[Row]]]
    summary: Row
    config_text: str
    config: Row
    warnings: list[str]
    written: datetime
    checkpoints: frozenset[str] = frozenset()  # names of those that are there, "model" among them


def _read_run(run_dir: Path) -> Run:
    warnings: list[str] = []
    metrics = run_dir / "metrics.jsonl"
    summary: Row = {}
    if (run_dir / "summary.json").is_file():
        try:
            loaded = json.loads((run_dir / "summary.json").read_text(encoding="utf-8", errors="replace"))
            summary = loaded if isinstance(loaded, dict) else {}
        except ValueError as error:
            warnings.append(f"summary.json is not JSON ({error}); the report was made without it.")
    config_text, config = "", None
    if (run_dir / "config.yaml").is_file():
        config_text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            config = yaml.safe_load(config_text)
        except yaml.YAMLError as error:
            warnings.append(f"config.yaml is not YAML ({getattr(error, 'problem', None) or error}).")
    return Run(
        name=run_dir.resolve().name,
        stages=_read_metrics(metrics, warnings),
        summary=summary,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        warnings=warnings,
        written=datetime.fromtimestamp(metrics.stat().st_mtime, tz=timezone.utc),
        checkpoints=frozenset(path.name for path in (*run_dir.glob("checkpoints/*"), *run_dir.glob("model"))),
    )


def _read_metrics(path: Path, warnings: list[str]) -> dict[str, dict[str, list[Row]]]:
    steps: dict[str, dict[str, dict[float, Row]]] = {}
    broken: list[int] = []
    not_finite: dict[str, list[float]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line_number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                broken.append(line_number)
                continue
            stage, split = str(row.get("stage", "training")), str(row.get("split", "train"))
            by_step = steps.setdefault(stage, {}).setdefault(split, {})
            step = row.get("step")
            row["step"] = step if _is_number(step) else len(by_step) + 1
            by_step.setdefault(row["step"], {}).update(row)
            for key, value in row.items():
                if value is None or isinstance(value, float) and not math.isfinite(value):  # the loop writes null
                    not_finite.setdefault(key, []).append(row["step"])
    if broken:
        warnings.append(f"{len(broken)} of the lines of metrics.jsonl are not JSON objects (first: line {broken[0]}).")
    for key, at in not_finite.items():
        warnings.append(f"{key} was NaN or infinite in {len(at)} lines, first at step {number(at[0], 8)}.")
    return {
        stage: {split: [_without_ties(by_step[s]) for s in sorted(by_step)] for split, by_step in splits.items()}
        for stage, splits in steps.items()
    }


def _without_ties(row: Row) -> Row:
    """Drops the reward accuracy of a policy that still is its own reference: all rewards are 0, so none is ahead."""
    margin = row.get("rewards/margins")
    tied = _is_number(margin) and abs(margin) < 1e-6  # type: ignore[arg-type]
    return {key: value for key, value in row.items() if not (tied and key == "rewards/accuracies")}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _series(rows: Iterable[Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]


def _flat(value: object, prefix: str = "") -> dict[str, float]:
    """{"exact_match": {"sort": 0.9}} -> {"exact_match/sort": 0.9}; whatever is not a finite number is left out."""
    if isinstance(value, dict):
        parts = [_flat(part, f"{prefix}/{key}" if prefix else str(key)) for key, part in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    return {prefix: float(value)} if prefix and _is_number(value) else {}  # type: ignore[arg-type]


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


def _start_and_end(splits: dict[str, list[Row]], key: str) -> tuple[float, float, str] | None:
    """First and last value of a held-out series; of a training series the means of its first and last tenth."""
    held_out = _series(splits.get("eval", ()), key)
    if len(held_out) >= 2:
        return held_out[0][1], held_out[-1][1], "held-out"
    values = [y for _, y in _series(splits.get("train", ()), key)]
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:]), "training"


def _before_and_after(run: Run) -> dict[str, tuple[float | None, float]]:
    """Name -> (before, after) the last stage that was evaluated twice: summary.json's values, else the evaluations'.

    Reward accuracy has no before where the policy started as its own reference.
    """
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for splits in run.stages.values():
        rows = splits.get("eval", [])
        if len(rows) >= 2:
            before, after = _flat(rows[0]), _flat(rows[-1])
    for name, ends in (("before", before), ("after", after)):
        if isinstance(run.summary.get(name), dict):
            ends |= _flat(_without_ties(run.summary[name]))
    return {key: (before.get(key), after[key]) for key in after if key in before or key == "rewards/accuracies"}


# ---- charts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One chart of a stage: its title, the metrics it draws, the axis, and how to sum it up in a sentence."""

    title: str
    keys: tuple[str, ...]
    y_label: str
    unit: str = ""  # after the figure in the sentence
    shares: bool = False
    guide: tuple[float, str] | None = None
    best: Any = None  # min or max: which held-out value to name
    remark: str = ""
    total: str = "ends"  # "ends": from start to end; "median" and "peak" for machine figures


LEARNING = (
    Panel("Loss", ("loss",), "loss", best=min),
    Panel("Log-probabilities of the responses", ("logps/chosen", "logps/rejected"), "log-prob, nats per response"),
    Panel("Chosen log-prob on its own scale", ("logps/chosen",), "log-prob, nats per response"),
    Panel(
        "Implicit rewards",
        ("rewards/chosen", "rewards/rejected"),
        "β · (log-prob − reference log-prob), nats",
        guide=(0.0, "as the reference"),
    ),
    Panel("Reward margin", ("rewards/margins",), "chosen − rejected reward, nats", guide=(0.0, "no preference")),
    Panel(
        "Reward accuracy",
        ("rewards/accuracies",),
        "pairs with the chosen response ahead",
        shares=True,
        guide=(0.5, "chance"),
        best=max,
    ),
    Panel("Exact match of greedy generations", ("exact_match",), "held-out prompts", shares=True, best=max),
)
_LENGTH = Panel(
    "Correlation of margin and length",
    ("watch/length_correlation",),
    "of the margin with |chosen| − |rejected|, over pairs",
    guide=(0.0, "no relation"),
)
WATCH = (
    Panel(
        "Log-probabilities since the start",
        ("watch/chosen_change", "watch/rejected_change"),
        "log-prob − its start, nats per response",
        guide=(0.0, "as at the start"),
    ),
    Panel("Chosen log-prob fell", ("watch/chosen_fell",), "pairs with a chosen log-prob below its start", shares=True),
    _LENGTH,
    Panel(
        "KL to the reference, on the data's responses",
        ("kl",),
        "k3 of the responses' log-ratios, nats per response",
        guide=(0.0, "as the reference"),
    ),
)
REWARD_MODEL = (
    LEARNING[0],
    Panel("Accuracy", ("accuracy",), "pairs with the larger reward for the chosen response", shares=True,
          guide=(0.5, "chance"), best=max),
    Panel("Rewards", ("rewards/chosen", "rewards/rejected"), "reward of a response"),
    Panel("Reward margin", ("margin",), "chosen − rejected reward", guide=(0.0, "no preference")),
    Panel("Mean reward", ("mean_reward",), "reward of a response, chosen and rejected alike", guide=(0.0, "0")),
    _LENGTH,
)
MACHINE = (
    Panel("Throughput", ("tokens_per_s",), "tokens per second", "tokens/s", total="median"),
    Panel("Peak memory", ("peak_memory_mib",), "MiB", "MiB", total="peak"),
    Panel("Learning rate", ("learning_rate",), "learning rate", total="peak"),
    Panel("Gradient norm", ("grad_norm",), "norm before clipping", total="median"),
)


def _panel(panel: Panel, splits: dict[str, list[Row]]) -> str:
    train, held_out = splits.get("train", ()), splits.get("eval", ())
    pair = len(panel.keys) == 2
    if pair and not all(_series(train, key) or _series(held_out, key) for key in panel.keys):
        return ""
    lines: list[Line] = []
    notes: list[str] = []
    width = 1
    for key in panel.keys:
        name = key.rsplit("/", 1)[-1].split("_")[0] + ", " if pair else ""
        role = key.rsplit("/", 1)[-1].split("_")[0] if pair else "train"
        raw, measured = _series(train, key), _series(held_out, key)
        smooth, this_width = (raw, 1) if panel.total == "peak" else _smooth(raw)  # a schedule has its corners
        width = max(width, this_width)
        if this_width > 1 and not pair:
            lines.append(Line("", raw, role, "trace"))
        lines.append(Line(name + "training", smooth, role, "pale" if measured else "line"))
        lines.append(Line(name + "held-out", measured, role if pair else "eval", "marked"))
        notes.append(_sentence(panel, key, splits, name))
    if width > 1 and panel.total == "ends":
        notes.append(f"Training lines are running means of {width} logged values.")
    return line_chart(
        panel.title,
        lines,
        y_label=panel.y_label,
        note=" ".join(note for note in (*notes, panel.remark) if note),
        shares=panel.shares,
        from_zero=panel.total != "ends",
        guide=panel.guide,
        size="large" if panel.total == "ends" else "small",
    )


def _sentence(panel: Panel, key: str, splits: dict[str, list[Row]], name: str) -> str:
    """The figures of a chart in words, for those who cannot see it and for those in a hurry."""
    show = percent if panel.shares else number
    if panel.total != "ends":
        values = [y for _, y in _series(splits.get("train", ()), key)]
        if not values:
            return ""
        value = statistics.median(values) if panel.total == "median" else max(values)
        return f"{panel.total.capitalize()} {show(value)} {panel.unit}".rstrip() + "."
    held_out = _series(splits.get("eval", ()), key)
    if len(held_out) == 1:
        return f"{(name + 'held-out').capitalize()}: {show(held_out[0][1])} at step {number(held_out[0][0], 8)}."
    ends = _start_and_end(splits, key)
    if ends is None:
        return ""
    start, end, basis = ends
    words = f"{(name + basis).capitalize()}: {show(start)} → {show(end)}"
    if panel.best and basis == "held-out":
        step, value = panel.best(held_out, key=lambda point: point[1])
        if value != end:
            word = "lowest" if panel.best is min else "highest"
            words += f"; {word} {show(value)} at step {number(step, 8)}"
    return words + "."


# ---- the words on top ----------------------------------------------------------------------------------------------

# key, label, is it a share, better when it rises (None: neither)
HEADLINES = (
    ("exact_match", "Exact match, greedy", True, True),
    ("rewards/accuracies", "Reward accuracy", True, True),
    ("rewards/margins", "Reward margin", False, True),
    ("accuracy", "Accuracy", True, True),
    ("margin", "Reward margin", False, True),
    ("mean_reward", "Mean reward", False, None),
    ("logps/chosen", "Chosen log-prob", False, None),
    ("logps/rejected", "Rejected log-prob", False, None),
    ("loss", "Loss", False, False),
)


def _headlines(run: Run, pairs: dict[str, tuple[float | None, float]]) -> str:
    cards = []
    stage = escape(next(reversed(run.stages), ""))
    for key, label, shares, up in HEADLINES:
        if key not in pairs:
            continue
        before, after = pairs[key]
        show = percent if shares else partial(number, digits=4)
        if before is None:
            cards.append(
                f'<div class="card number"><dt>{label}</dt><dd><strong>{show(after)}</strong>'
                f'<span class="was">before {stage}: all tied</span></dd></div>'
            )
            continue
        change = after - before
        better = "" if up is None or change == 0 else "better" if (change > 0) == up else "worse"
        amount = f"{abs(100 * change):.1f} points" if shares else number(abs(change))
        arrow = "▲" if change > 0 else "▼" if change < 0 else "="
        mood = f' <span class="mood">{better}</span>' if better else ""
        cards.append(
            f'<div class="card number {better}"><dt>{label}</dt><dd><strong>{show(after)}</strong>'
            f'<span class="change-by">{arrow} {amount}{mood}</span>'
            f'<span class="was">before {stage}: {show(before)}</span></dd></div>'
        )
    summary = run.summary
    for key, label, unit in (("tokens_per_s", "Throughput", "tokens/s"), ("peak_memory_mib", "Peak memory", "MiB")):
        value = summary.get(key)
        if not _is_number(value):
            values = [y for splits in run.stages.values() for _, y in _series(splits.get("train", ()), key)]
            value = (max(values) if key == "peak_memory_mib" else statistics.median(values)) if values else None
        if value is not None:
            seconds = summary.get("seconds", math.nan)
            extra = f"{_duration(seconds)} in all" if key == "tokens_per_s" and _is_number(seconds) else ""
            cards.append(
                f'<div class="card number"><dt>{label}</dt><dd><strong>{number(value, 4)} <small>{unit}</small>'
                f'</strong><span class="was">{extra}</span></dd></div>'
            )
    return f'<dl class="numbers">{"".join(cards)}</dl>' if cards else ""


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _findings(run: Run) -> str:
    """What the run shows, one sentence a point: only what its own numbers say."""
    said: list[str] = []
    matches = {stage: _series(splits.get("eval", ()), "exact_match") for stage, splits in run.stages.items()}
    ends = [f"{percent(points[-1][1])} after {stage}" for stage, points in matches.items() if points]
    if ends:
        first_stage, first = next((stage, points[0]) for stage, points in matches.items() if points)
        start = [f"{percent(first[1])} before {first_stage}"] if first[0] == 0 else []
        said.append(f"Exact match of greedy generations on held-out prompts: {', '.join(start + ends)}.")
    for stage, splits in run.stages.items():
        if _start_and_end(splits, "logps/chosen") and _start_and_end(splits, "logps/rejected"):
            said.append(f"{stage}: {_chosen_sentence(splits)}")
    for stage, splits in run.stages.items():
        loss = _series(splits.get("eval", ()), "loss")
        if len(loss) >= 3:
            step, lowest = min(loss, key=lambda point: point[1])
            last = loss[-1][1]
            if last > lowest + 0.02 * max(abs(lowest), abs(loss[0][1] - lowest)):
                said.append(
                    f"The held-out loss of {stage} was lowest at step {number(step, 8)} ({number(lowest)}) and "
                    f"ended at {number(last)}: the run went on past its best point."
                )
    for stage, splits in run.stages.items():
        said += [f"{stage}: {text}" for text in _watch_findings(run, stage, splits)]
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f'<div class="card findings"><h3>What the numbers say</h3><ul>{items}</ul></div>' if said else ""


def _watch_findings(run: Run, stage: str, splits: dict[str, list[Row]]) -> list[str]:
    """What the watch on over-optimisation has to say of a stage."""
    said = []
    fell = _start_and_end(splits, "watch/chosen_fell")
    if fell and fell[1] >= 0.25:
        said.append(f"the chosen log-prob of {percent(fell[1])} of the {fell[2]} pairs is below its start.")
    length = _start_and_end(splits, "watch/length_correlation")
    if length and abs(length[1]) >= 0.3:
        side = "longer" if length[1] > 0 else "shorter"
        said.append(f"the margin goes with length (correlation {number(length[1])}, {length[2]}): it is larger where "
                    f"the chosen response is the {side} one.")
    points = _fresh_points(splits)
    if points:
        sentence = best_sentence(points, _place_of(run, stage, splits, best_of(points).step))
        said.append(sentence[0].lower() + sentence[1:])
    budget = _history(run, stage).get("kl_budget")
    if isinstance(budget, dict) and _is_number(budget.get("kl")):
        then = "the stage ended there" if budget.get("action") == "stop" else "the stage went on"
        said.append(f"the KL budget of {number(budget.get('budget'))} nats was reached at step "
                    f"{number(budget.get('step'), 8)} ({number(budget['kl'])}, {budget.get('of')}); checkpoint "
                    f"{budget.get('checkpoint')} was kept, and {then}.")
    return said


def _history(run: Run, stage: str) -> Row:
    """What summary.json says of a stage."""
    stages = run.summary.get("stages")
    found = stages.get(stage) if isinstance(stages, dict) else None
    return found if isinstance(found, dict) else {}


def _fresh_points(splits: dict[str, list[Row]]) -> list[Measured]:
    """Fresh samples that were scored."""
    return [
        Measured(row["step"], row["kl"], row["reward"], row.get("reward_error"))
        for row in splits.get("sample", ())
        if _is_number(row.get("kl")) and _is_number(row.get("reward"))
    ]


def _place_of(run: Run, stage: str, splits: dict[str, list[Row]], step: float) -> str:
    """Where the weights of a step are."""
    found = [name for name in run.checkpoints if name.endswith(f"-{stage}-{step:08.0f}")]
    if found:
        return f"checkpoints/{found[0]}"
    ended = step == max(row["step"] for rows in splits.values() for row in rows) and stage == next(reversed(run.stages))
    return "model/" if ended and "model" in run.checkpoints else "no checkpoint was saved there"


def _watch(run: Run, stage: str, splits: dict[str, list[Row]]) -> str:
    """The charts of the watch on over-optimisation."""
    points, rows = _fresh_points(splits), splits.get("sample", ())
    estimators = [
        Line(label, _series(rows, key), role, "marked",
             [row.get(f"{key}_error") or 0.0 for row in rows if _is_number(row.get(key))])
        for key, label, role in (("kl_k1", "k1", "train"), ("kl_k3", "k3", "eval"))
    ]
    implicit = [
        Measured(row["step"], row["kl"], row["rewards/margins"])
        for row in splits.get("eval", ())
        if _is_number(row.get("kl")) and _is_number(row.get("rewards/margins"))
    ]
    if points:
        best = best_of(points)
        reward = frontier(points, _place_of(run, stage, splits, best.step))
    else:
        reward = implicit_frontier(implicit)
    note = ""
    if rows:
        last = rows[-1]
        shares = [y for _, y in _series(rows, "time_share")]
        cost = f" They took {percent(shares[-1])} of the training time." if shares else ""
        k1, k3 = number(last.get("kl_k1")), number(last.get("kl_k3"))
        samples = number(last.get("samples"))
        note = (f"{len(rows)} times {samples} responses; the last: {k3} nats by k3, {k1} by k1. "
                "Bars are standard errors; k3 is the better one up to about 0.25 nats a token, k1 beyond."
                + cost)
    return "".join([
        *(_panel(panel, splits) for panel in WATCH),
        line_chart("KL to the reference, on fresh samples", estimators, y_label="nats per response", note=note,
                   guide=(0.0, "as the reference")),
        reward,
    ])


def _chosen_sentence(splits: dict[str, list[Row]]) -> str:
    """Does the chosen log-prob fall? The question of the RPO paper (arXiv 2405.16436), answered with the number."""
    ends, rejected = _start_and_end(splits, "logps/chosen"), _start_and_end(splits, "logps/rejected")
    assert ends and rejected
    start, end, basis = ends
    change = end - start
    rejected_start, rejected_end, _ = rejected
    where = (
        f"({basis}: {number(start, 4)} to {number(end, 4)} nats per response; "
        f"rejected: {number(rejected_start, 4)} to {number(rejected_end, 4)})"
    )
    if change >= 0:
        return f"the chosen log-prob did not fall, it rose by {number(change)} nats {where}."
    if rejected_end - rejected_start < change:
        return f"the chosen log-prob fell by {number(-change)} nats, the rejected one by more {where}."
    return f"the chosen log-prob fell by {number(-change)} nats, and the rejected one by less {where}."


# ---- the page ------------------------------------------------------------------------------------------------------


def _page(run: Run) -> str:
    pairs = _before_and_after(run)
    body = [
        _header(run),
        "".join(f'<p class="warning">{escape(text)}</p>' for text in run.warnings),
        _headlines(run, pairs),
        f'<div class="charts top">{_findings(run)}{_tasks(run, pairs)}</div>',
        *(_stage(i, stage, splits, run) for i, (stage, splits) in enumerate(run.stages.items(), 1)),
        _samples(run),
        _details(run),
    ]
    if not run.stages:
        body.append('<p class="warning">metrics.jsonl is empty: nothing was logged, so there is nothing to draw.</p>')
    return html_page(f"{run.name} · fastpref run", body)


def html_page(title: str, body: Iterable[str]) -> str:
    """The page around parts that are escaped already, with the style they share; nothing in it is fetched or runs."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>{''.join(part for part in body if part)}</main></body></html>\n"
    )


def _header(run: Run) -> str:
    names = {"model_name_or_path": "model", "seed": "seed"}
    facts = [f"{name} {run.config[key]}" for key, name in names.items() if key in run.config]
    if isinstance(run.summary.get("device"), str):
        facts.append(run.summary["device"])
    facts.append(run.written.strftime("%Y-%m-%d %H:%M UTC"))
    stages = [f'<a href="#stage-{i}">{escape(stage)}</a>' for i, stage in enumerate(run.stages, 1)]
    items = "".join(f"<li>{item}</li>" for item in [" then ".join(stages), *map(escape, facts)] if item)
    return f'<header><h1>{escape(run.name)}</h1><ul class="facts">{items}</ul></header>'


def _tasks(run: Run, pairs: dict[str, tuple[float | None, float]]) -> str:
    rows = [
        (key.split("/", 1)[1], before, after)
        for key, (before, after) in sorted(pairs.items())
        if key.startswith("exact_match/") and before is not None
    ]
    stage = next(reversed(run.stages), "")
    note = f"{sum(after > before for _, before, after in rows)} of {len(rows)} tasks improved."
    return change_chart(f"Exact match by task, before and after {stage}", rows, note=note)


def _stage(index: int, stage: str, splits: dict[str, list[Row]], run: Run) -> str:
    rewarded = any(_series(rows, "mean_reward") for rows in splits.values())
    learning = "".join(_panel(panel, splits) for panel in (REWARD_MODEL if rewarded else LEARNING))
    machine = "".join(_panel(panel, splits) for panel in MACHINE)
    train = splits.get("train", [])
    facts = [f"{key} {value}" for key, value in _settings(stage, run.config).items()]
    if train:
        facts.append(f"{number(train[-1]['step'], 8)} optimiser steps")
        if _is_number(train[-1].get("epoch")):
            facts.append(f"{number(train[-1]['epoch'])} epochs")
    if splits.get("eval"):
        facts.append(f"{len(splits['eval'])} evaluations")
    stages = run.summary.get("stages")
    cost = _flat(stages.get(stage) if isinstance(stages, dict) else None)
    if "num_tokens" in cost and "seconds" in cost:
        facts.append(f"{number(cost['num_tokens'])} tokens in {_duration(cost['seconds'])}")
    if cost.get("skipped_steps"):
        facts.append(f"{number(cost['skipped_steps'])} steps skipped for NaN or infinite gradients")
    heading = f"Stage {index}: {escape(stage)} <small>{escape(', '.join(facts))}</small>"
    parts = [f'<section id="stage-{index}"><h2>{heading}</h2>']
    if learning:
        parts.append(f'<div class="charts">{learning}</div>')
    watch = "" if rewarded else _watch(run, stage, splits)
    if watch:
        parts.append(f'<h3 class="sub">Watch on over-optimisation</h3><div class="charts">{watch}</div>')
    if machine:
        parts.append(f'<h3 class="sub">Optimiser and machine</h3><div class="charts small">{machine}</div>')
    parts.append(_evaluations(splits.get("eval", [])) + "</section>")
    return "".join(parts)


def _settings(stage: str, config: Row) -> Row:
    """What a stage was run with, of the keys that people compare: its own where it sets them, else the run's."""
    sections = config.get("stages")
    for section in sections if isinstance(sections, list) else ():
        if isinstance(section, dict) and stage in (section.get("name"), section.get("loss")):
            config = config | section
    keys = ("loss", "beta", "eta", "center_coefficient", "learning_rate", "per_device_train_batch_size",
            "max_tokens_per_batch", "gradient_accumulation_steps")
    return {key: config[key] for key in keys if isinstance(config.get(key), (str, int, float))}


def _evaluations(rows: list[Row]) -> str:
    if not rows:
        return ""
    shares = {key for panel in (*LEARNING, *WATCH, *REWARD_MODEL) if panel.shares for key in panel.keys}
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value)))
    keys = [key for key in keys if not key.startswith("exact_match/")]  # the tasks have a chart
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in keys)
    shown = spread(rows, MOST_EVALUATIONS)
    lines = []
    for row in shown:
        cells = []
        for key in keys:
            value = row.get(key) if _is_number(row.get(key)) else None
            cells.append(f"<td>{'' if value is None else percent(value) if key in shares else number(value, 4)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    title = f"All {len(rows)} evaluations" if len(shown) == len(rows) else f"{len(shown)} of {len(rows)} evaluations"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<details><summary>{title} as a table</summary><div class="scroll">{table}</div></details>'


def _samples(run: Run) -> str:
    samples = run.summary.get("samples")
    if not isinstance(samples, list):
        return ""
    cards, stage = [], escape(next(reversed(run.stages), ""))
    for sample in samples[:MOST_SAMPLES]:
        if not isinstance(sample, dict):
            continue
        parts = [f'<div><h4>Prompt</h4><pre>{_clip(sample.get("prompt", ""))}</pre></div>']
        rights = sample.get("right")
        for i, when in enumerate(("before", "after")):
            if when in sample:
                mark = ""
                if isinstance(rights, list) and len(rights) == 2:
                    mark = '<span class="right">✓ right</span>' if rights[i] else '<span class="wrong">✗ wrong</span>'
                heading = f"{when.capitalize()} {stage} {mark}"
                parts.append(f"<div><h4>{heading}</h4><pre>{_clip(sample[when])}</pre></div>")
        if sample.get("expected") is not None:
            parts.append(f"<div><h4>Expected</h4><pre>{_clip(sample['expected'])}</pre></div>")
        cards.append(f'<article class="card sample">{"".join(parts)}</article>')
    return f"<section><h2>Generated samples <small>greedy</small></h2>{''.join(cards)}</section>" if cards else ""


def _clip(text: object, most: int = MOST_SAMPLE_CHARS) -> str:
    """Escaped, and cut with a note where it is longer than `most` characters."""
    text = str(text)
    more = f" … ({len(text) - most:,} more characters)" if len(text) > most else ""
    return escape(text[:most] + more)


def _details(run: Run) -> str:
    parts = []
    if run.config_text.strip():
        config = _clip(run.config_text.rstrip(), MOST_CONFIG_CHARS)
        parts.append(f"<details><summary>Configuration (config.yaml)</summary><pre>{config}</pre></details>")
    versions = run.summary.get("versions")
    facts = {"device": run.summary.get("device"), **(versions if isinstance(versions, dict) else {})}
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{_clip(value, 300)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    if rows:
        parts.append(f"<details open><summary>Versions and hardware</summary><table>{rows}</table></details>")
    return f"<section><h2>How it was made</h2>{''.join(parts)}</section>" if parts else ""


# Okabe-Ito blue and vermillion (told apart by every kind of colour vision), lighter in the dark; dashes and marker
# shapes repeat what the colours say.
_CSS = """
:root{--page:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5a6675;--line:#dfe4ea;--chosen:#0072b2;--rejected:#d55e00;
--train:#66758a;--eval:#0072b2;--good:#00785a;--bad:#b34700;--note:#fff4d6}
@media (prefers-color-scheme:dark){:root{--page:#10151b;--card:#18202a;--ink:#e8edf3;--soft:#a3b0bf;--line:#2d3845;
--chosen:#56b4e9;--rejected:#f0904a;--train:#93a3b8;--eval:#56b4e9;--good:#4cc9a0;--bad:#f0a05a;--note:#3a3113}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1140px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:2.4rem 0 .8rem}h2 small{display:block;font-size:.92rem;font-weight:400;color:var(--soft)}
h3{font-size:1.02rem;margin:0 0 .3rem}h3.sub{color:var(--soft);margin:1.4rem 0 .6rem}
h4{font-size:.8rem;margin:0;color:var(--soft);font-weight:600}
.facts{list-style:none;padding:0;margin:.5rem 0 1.4rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.1rem .6rem}
.facts li{overflow-wrap:anywhere}.facts li:not(:last-child)::after{content:"·";margin-left:.6rem}a{color:inherit}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0;min-width:0}
.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:12px;margin:0}
.number dt{color:var(--soft);font-size:.85rem}.number dd{margin:0;display:flex;flex-direction:column}
.number strong{font-size:1.6rem;line-height:1.3;font-variant-numeric:tabular-nums}
.number small{font-size:.85rem;font-weight:400}
.change-by{font-size:.9rem;font-weight:600}.better .change-by{color:var(--good)}.worse .change-by{color:var(--bad)}
.mood{font-weight:400}.was{color:var(--soft);font-size:.85rem}
.top{margin-top:16px}.findings ul{margin:.3rem 0 0;padding-left:1.2rem}.findings li{margin:.45rem 0}
.warning{background:var(--note);border-radius:8px;padding:.6rem .9rem;margin:.5rem 0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:0 1rem;margin:0 0 .3rem;padding:0;font-size:.85rem}
.legend{color:var(--soft)}.legend li{display:flex;align-items:center;gap:.4rem}.swatch{width:30px;height:12px;flex:none}
.chart{display:block;width:100%;height:auto}
figcaption{font-size:.85rem;color:var(--soft);margin-top:.3rem}
svg text{font-size:12px;fill:var(--soft)}svg .label,svg .row-label{fill:var(--ink)}
svg path{fill:none;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}
svg .guide{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:1 4}
svg .guide-label{font-size:11px;font-style:italic;paint-order:stroke;stroke:var(--card);stroke-width:3px}
.chosen{stroke:var(--chosen);fill:var(--chosen)}.rejected{stroke:var(--rejected);fill:var(--rejected)}
.train{stroke:var(--train);fill:var(--train)}.eval{stroke:var(--eval);fill:var(--eval)}
svg .rejected path{stroke-dasharray:7 5}
.law{stroke:var(--rejected);fill:none}.quadratic{stroke:var(--train);fill:none}
svg .quadratic path{stroke-dasharray:7 5}.best{stroke:var(--good);fill:none}svg .ring{stroke-width:1.8}
svg .error{stroke-width:1.2;stroke-opacity:.6}svg .points circle{stroke:var(--card);stroke-width:1}
svg .trace path{stroke-width:1;stroke-opacity:.35}svg .pale path{stroke-width:1.4;stroke-opacity:.8}
.marked circle,.marked rect{stroke:var(--card);stroke-width:1}
.change path{stroke:var(--chosen);stroke-width:3}.change .after{fill:var(--chosen)}
.change .before{fill:var(--card);stroke:var(--soft);stroke-width:2}
pre{margin:.2rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font:.86rem/1.45 ui-monospace,Menlo,Consolas,monospace}
.sample{display:grid;grid-template-columns:2fr 1fr 1fr 1fr;gap:6px 18px;margin-bottom:10px}.sample div{min-width:0}
.right{color:var(--good)}.wrong{color:var(--bad)}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--soft);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;margin:.5rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th[scope=row],th[scope=row]+td{text-align:left;white-space:normal;overflow-wrap:anywhere}
@media (max-width:600px){main{padding:18px 12px 40px}.sample{grid-template-columns:1fr}
.charts:not(.small) svg text{font-size:16px}
.charts.small .chart{max-width:320px}.numbers{grid-template-columns:1fr 1fr}.number strong{font-size:1.35rem}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--chosen:#0072b2;--rejected:#d55e00;
--train:#66758a;--eval:#0072b2;--good:#00785a;--bad:#b34700;--note:#eee;color-scheme:light}
html{font-size:12px}body{font-size:9pt}main{max-width:none;padding:0}.card,h2,tr{break-inside:avoid}h2,h3,summary{break-after:avoid}
.charts{grid-template-columns:1fr 1fr}.charts.small,.numbers{grid-template-columns:repeat(4,1fr)}
details::details-content{content-visibility:visible;display:block}
details pre{columns:2;font-size:8pt}.scroll{overflow:visible}table{font-size:7pt}th,td{padding-right:.4rem}}
"""
