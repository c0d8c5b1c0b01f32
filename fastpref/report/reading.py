"""The files of a run -> its stages and their rows.

metrics.jsonl: one JSON object a line, {"stage", "split": "train" | "eval" | "sample", "step", ...values}. Where a
resumed run repeats a step, the later line counts.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from fastpref.errors import UserError

from .charts import Point, spread
from .metrics import number, without_ties

Row = dict[str, Any]
MOST_TIMES = 6  # of a prompt's responses that are shown


@dataclass(frozen=True)
class Stage:
    name: str
    splits: dict[str, list[Row]]  # one row a step, in the order of training
    history: Row  # what summary.json says of it

    def rows(self, split: str) -> list[Row]:
        return self.splits.get(split, [])

    def series(self, split: str, key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in self.rows(split) if is_number(row.get(key))]

    @property
    def budget(self) -> Row:
        """The KL budget that was reached, if one was."""
        found = as_row(self.history.get("kl_budget"))
        return found if is_number(found.get("kl")) else {}

    def ends(self, key: str) -> tuple[float, float, str] | None:
        """First and last value of a held-out series; of a training series the means of its first and last tenth."""
        held_out = self.series("eval", key)
        if len(held_out) >= 2:
            return held_out[0][1], held_out[-1][1], "held-out"
        values = [y for _, y in self.series("train", key)]
        if len(values) < 2:
            return None
        tenth = max(1, len(values) // 10)
        return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:]), "training"


@dataclass(frozen=True)
class Run:
    name: str
    stages: list[Stage]  # in the order of training
    summary: Row
    config_text: str
    config: Row
    warnings: list[str]
    written: datetime
    checkpoints: frozenset[str]  # names of those that are there, "model" among them
    sampled: str = ""  # samples.jsonl

    def developed(self, stage: Stage) -> list[Row]:
        """Fresh samples: a row a prompt, with its (step, response, reward or None) at every sampling."""
        found: dict[str, dict[float, Row]] = {}
        for line in self.sampled.splitlines():
            try:
                row = as_row(json.loads(line))
            except ValueError:
                continue
            for sample in row.get("samples", ()) if row.get("stage") == stage.name else ():
                found.setdefault(text_of(sample["prompt"]), {})[row["step"]] = sample
        return [{"prompt": prompt, "responses": [
            (step, text_of(sample["response"]), sample.get("reward")) for step, sample in spread(sorted(
                steps.items(), key=lambda item: item[0]), MOST_TIMES)]} for prompt, steps in found.items()]

    @property
    def samples(self) -> list[Row]:
        """What was generated before and after."""
        found = self.summary.get("samples")
        return [sample for sample in found if isinstance(sample, dict)] if isinstance(found, list) else []

    def place_of(self, stage: Stage, step: float) -> str:
        """Where the weights of a step are; "" where they were not saved."""
        found = [name for name in self.checkpoints if name.endswith(f"-{stage.name}-{step:08.0f}")]
        if found:
            return f"checkpoints/{found[0]}"
        ended = stage.name == self.last and step == max(row["step"] for rows in stage.splits.values() for row in rows)
        return "model/" if ended and "model" in self.checkpoints else ""

    @property
    def last(self) -> str:
        """The last stage's name."""
        return self.stages[-1].name if self.stages else ""


def read_run(run_dir: Path, summary: Any = None) -> Run:
    """summary: what is not in summary.json yet.

    Raises UserError if there is no metrics.jsonl; whatever else is missing or broken is left out, or a warning."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"run_dir: no metrics.jsonl in {run_dir}; expected the folder of a training run")
    warnings: list[str] = []
    try:
        summary = summary or json.loads(_text(run_dir / "summary.json") or "{}")
    except ValueError as error:
        warnings.append(f"summary.json is not JSON ({error}); the report was made without it.")
    summary = as_row(summary)
    config_text, config = _text(run_dir / "config.yaml"), None
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        warnings.append(f"config.yaml is not YAML ({getattr(error, 'problem', None) or error}).")
    stages = _read_metrics(metrics, warnings)
    histories = as_row(summary.get("stages"))
    return Run(
        name=run_dir.resolve().name,
        stages=[Stage(name, splits, as_row(histories.get(name))) for name, splits in stages.items()],
        summary=summary,
        config_text=config_text,
        config=as_row(config),
        warnings=warnings,
        written=datetime.fromtimestamp(metrics.stat().st_mtime, tz=timezone.utc),
        checkpoints=frozenset(path.name for path in (*run_dir.glob("checkpoints/*"), *run_dir.glob("model"))),
        sampled=_text(run_dir / "samples.jsonl"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


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
            row["step"] = step if is_number(step) else len(by_step) + 1
            by_step.setdefault(row["step"], {}).update(row)
            for key, value in row.items():
                if value is None or isinstance(value, float) and not math.isfinite(value):  # the loop writes null
                    not_finite.setdefault(key, []).append(row["step"])
    if broken:
        warnings.append(f"{len(broken)} of the lines of metrics.jsonl are not JSON objects (first: line {broken[0]}).")
    for key, at in not_finite.items():
        warnings.append(f"{key} was NaN or infinite in {len(at)} lines, first at step {number(at[0], 8)}.")
    return {
        stage: {split: [without_ties(by_step[s]) for s in sorted(by_step)] for split, by_step in splits.items()}
        for stage, splits in steps.items()
    }


def text_of(text: Any) -> str:
    """For people: a text, or messages with their roles."""
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in text)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_row(value: object) -> Row:
    """Empty for what is no dict."""
    return value if isinstance(value, dict) else {}


def flat(value: object, prefix: str = "") -> dict[str, float]:
    """{"exact_match": {"sort": 0.9}} -> {"exact_match/sort": 0.9}; whatever is not a finite number is left out."""
    if isinstance(value, dict):
        parts = [flat(part, f"{prefix}/{key}" if prefix else str(key)) for key, part in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    return {prefix: float(value)} if prefix and is_number(value) else {}
