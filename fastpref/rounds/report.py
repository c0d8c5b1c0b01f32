"""What rounds came to: lines while they run, the table at their end, and report.html for all of them.

The page, report/templates/rounds.html, is made of files alone (summary.json, config.yaml, pairs.jsonl), at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.table import Table

from fastpref.files import write_text
from fastpref.report.charts import Line, line_chart
from fastpref.report.metrics import number, percent
from fastpref.report.page import change_card
from fastpref.report.reading import text_of
from fastpref.report.render import render
from fastpref.report.verdict import POINTS, Gold, Verdict, link_of, verdict_of_rounds
from fastpref.train.display import Display, duration

Values = Mapping[str, Any]

PARTS = ("sampling", "scoring", "pairing", "reference", "training", "watch", "evaluation", "saving",
         "between")  # of wall time
MOST_PAIRS, MOST_CHARS = 8, 600  # shown of the last round


def round_lines(values: Values, of: int) -> list[str]:
    """At the end of a round: what came of it, and where its time went."""
    counts = values["counts"]
    parts = [f"{values['pairs']:,} {_noun(values)} of {counts['prompts']:,} prompts{_dropped(values)}"]
    parts += [f"{values['offline']:,} offline"] * bool(values["offline"])
    skipped = [f"{counts[key]:,} {key}" for key in ("duplicates", "empty", "failed", "cut") if counts[key]]
    aside = f" ({', '.join(skipped)})" if skipped else ""
    parts.append(f"{counts['responses']:,} responses{aside}")
    parts += [f"reward {number(values['reward'])}"] * (values["reward"] is not None)
    parts += [f"{n:,} {what}" for what, n in values.get("judge", {}).items()]
    name = f"round {values['round']}/{of}"
    if "kl_budget" in values:
        parts.append(f"KL budget of {values['kl_budget']['budget']:g} nats reached")
    return [f"{name} | {' | '.join(parts)}", *_results(name, values), f"{name} | {time_split(values['seconds'])}"]


def _results(name: str, values: Values) -> list[str]:
    found = [f"{held.label} {held.show(held.value)}" for held in _values(values)]
    return [f"{name} held-out | {' | '.join(found)}"] if found else []


def _noun(values: Values) -> str:
    stages = values.get("training", {}).get("stages", {})
    return "examples" if "sft" in stages else "pairs"


def _dropped(values: Values) -> str:
    parts = [f"{n:,} {why}" for why, n in values["dropped"].items()]
    return f" ({', '.join(parts)})" if parts else ""


def time_split(seconds: Values) -> str:
    """In order of size, the parts that make up a hundredth or more."""
    total = seconds["total"]
    parts = sorted(((seconds.get(part, 0.0), part) for part in PARTS), reverse=True)
    return f"{duration(total)} | " + ", ".join(
        f"{part} {100 * value / total:.0f} %" for value, part in parts if value >= 0.005 * total
    )


class Value(NamedTuple):
    """What is known of a round's weights on held-out prompts: its name, how to show it, and its standard error."""

    label: str
    value: float
    show: Callable[[float], str]
    error: float = 0.0


def _values(row: Values) -> list[Value]:
    after, best = row.get("after", {}), row.get("best_of_n", [])
    found = [Value("exact match", after.get("exact_match"), percent)]
    for label, one in [("reward", one) for one in best[:1]] + [(f"best of {one['n']}", one) for one in best[1:][-1:]]:
        found.append(Value(label, one["reward"], number, one.get("error") or 0.0))
    return [value for value in (*found, Value("KL", after.get("watch/kl"), number)) if value.value is not None]


def show_table(display: Display, summary: Values) -> None:
    """A row a round, the start first."""
    rows = [summary["start"], *summary["rounds"]]
    labels = _labels(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fits 80 columns
    held_out = [f"held-out\n{label}" for label in labels]
    for head in ("round", "prompts", _noun(rows[-1]), "sampled\nreward", *held_out, "time"):
        table.add_column(head.replace("exact ", "exact\n"), justify="right")
    for row in rows:
        shown = _shown(row)
        cells = [shown.get(label, "") for label in labels]
        if not row["round"]:
            table.add_row("start", "", "", "", *cells, "")
            continue
        reward = "" if row["reward"] is None else number(row["reward"])
        table.add_row(str(row["round"]), f"{row['counts']['prompts']:,}", f"{row['pairs']:,}", reward, *cells,
                      duration(row["seconds"]["total"]))
    display.console.print(table)
    display.say(f"all rounds | {time_split(_total_seconds(summary['rounds']))}")
    display.verdict(judged(rows).content())


def judged(rows: Sequence[Values]) -> Verdict:
    """The verdict on all rounds; rows: the start and every round."""
    golds = []
    for label in ("reward", "exact match"):
        found = _series(rows, label)
        if found:
            least = POINTS if label == "exact match" else 0.0
            golds.append(Gold(f"held-out {label}", [(at, held.value, held.error) for at, held in found],
                              found[0][1].show, least, "round"))
    sampled = _sampled(rows)
    if sampled and not _series(rows, "reward"):
        points = [(at, held.value, held.error) for at, held in sampled]
        golds.append(Gold("sampled reward", points, at="the start of round"))
    return verdict_of_rounds(rows, golds)


def _sampled(rows: Sequence[Values]) -> list[tuple[int, Value]]:
    """Rewards of the samples that the rounds trained on, by the weights with which each began."""
    return [(row["round"], Value("sampled reward", row["reward"], number, row["reward_error"])) for row in rows[1:]
            if row["reward"] is not None and row.get("reward_error") is not None]


def _total_seconds(rows: Sequence[Values]) -> dict[str, float]:
    return {part: sum(row["seconds"].get(part, 0.0) for row in rows) for part in (*PARTS, "total")}


# ---- the page --------------------------------------------------------------------------------------------------------


def write_page(run_dir: Path) -> Path:
    """Writes run_dir/report.html (atomically) from summary.json, and returns its path."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    rounds = summary["rounds"]
    rows = [summary["start"], *rounds]
    name, verdict = run_dir.resolve().name, judged(rows)
    path = run_dir / "report.html"
    write_text(path, render(
        "rounds.html", title=f"{name} · fastpref rounds", name=name, device=summary.get("device", ""),
        verdict=verdict, link=link_of(verdict, run_dir), cards=_headlines(rows),
        findings=_findings(rows), charts=_charts(rows), labels=_labels(rows), rounds=rounds,
        rows=[_row(run_dir, row) for row in rows if row["round"] or _values(row)],
        parts_of_time=[part for part in PARTS if any(row["seconds"].get(part) for row in rounds)],
        pairs=_pairs(run_dir / f"round-{rounds[-1]['round']:03d}" / "pairs.jsonl"), config=config.rstrip(),
    ))
    return path


def _labels(rows: Sequence[Values]) -> list[str]:
    """Of the columns in which a row has a value."""
    return list(dict.fromkeys(held.label for row in rows for held in _values(row)))


def _shown(row: Values) -> dict[str, str]:
    return {held.label: held.show(held.value) for held in _values(row)}


def _row(run_dir: Path, row: Values) -> dict[str, Any]:
    """What the page's table says of a round; to: its own report, where it has one."""
    to = f"round-{row['round']:03d}/train/report.html" if row["round"] else "start/report.html"
    return {**row, "to": to if (run_dir / to).is_file() else "", "held_out": _shown(row)}


def _series(rows: Sequence[Values], label: str) -> list[tuple[int, Value]]:
    """Of the start (round 0) and every round."""
    return [(row["round"], held) for row in rows for held in _values(row) if held.label == label]


def _headlines(rows: Sequence[Values]) -> list[dict[str, Any]]:
    cards = []
    goals = _goals(rows)
    series = [(f"Held-out {label}", "before round 1", _series(rows, label)) for label in goals]
    series += [("Sampled reward", "in round 1", _sampled(rows))] * ("reward" not in goals)
    for label, when, points in series:
        if len(points) >= 2:
            (_, first), (_, last) = points[0], points[-1]
            cards.append(change_card(label, first.value, last.value, last.show, "higher", when,
                                     math.hypot(first.error, last.error)))
    time, _, split = time_split(_total_seconds(rows[1:])).partition(" | ")
    return [*cards, {"label": "Wall time", "value": time, "was": split}]


def _goals(rows: Sequence[Values]) -> list[str]:
    """What is better the larger it is."""
    return [held.label for held in _values(rows[-1]) if held.label != "KL"]


def _findings(rows: Sequence[Values]) -> list[str]:
    """Where the best round was not the last, by two standard errors of the difference or more."""
    said = []
    for label in _goals(rows):
        *_, (_, last) = points = _series(rows, label)
        at, best = max(points, key=lambda point: point[1].value)
        if 0 < 2 * math.hypot(best.error, last.error) <= best.value - last.value:
            where = f"after round {at}" if at else "before round 1"
            said.append(f"Held-out {label} was highest {where} ({best.show(best.value)}) and ended at "
                        f"{last.show(last.value)}: the rounds went on past their best.")
    return said


def _charts(rows: Sequence[Values]) -> list[Markup]:
    """Against the round; 0 is the model before the first."""
    def line(label: str, name: str = "held-out", role: str = "eval") -> Line:
        found = _series(rows, label)
        return Line(name, [(at, held.value) for at, held in found], role, "marked", [held.error for _, held in found])

    def of_rounds(value: Callable[[Values], float | None]) -> list[tuple[float, float]]:
        return [(row["round"], y) for row in rows[1:] if (y := value(row)) is not None]

    rewards = [line("reward", "held-out sample")]
    rewards += [line(label, f"held-out {label}", "rejected") for label in _goals(rows) if label.startswith("best of")]
    rewards.append(Line("sampled, as the round began", of_rounds(lambda row: row["reward"]), "train", "marked",
                        [row.get("reward_error") or 0.0 for row in rows[1:] if row["reward"] is not None]))
    pairs = [Line("kept", of_rounds(lambda row: row["pairs"]), "chosen", "marked"),
             Line("dropped", of_rounds(lambda row: sum(row["dropped"].values())), "rejected", "marked")]
    chart = partial(line_chart, x_label="round", x_name="round")
    return [
        chart("Exact match of greedy generations", [line("exact match")], y_label="held-out prompts", shares=True,
              note="Round 0 is the model before the first."),
        chart("Reward", rewards, y_label="score, mean over responses",
              note="Bars are standard errors." if any(any(line.errors) for line in rewards) else ""),
        chart("KL to the reference, on the data's responses", [line("KL")], y_label="nats per response",
              from_zero=True),
        chart("What pairing kept", pairs, y_label="pairs", from_zero=True),
    ]


def _pairs(path: Path) -> list[list[tuple[str, str, float | None]]]:
    """The first few examples of a round: (what, text, score) of their parts."""
    cards = []
    with path.open(encoding="utf-8") if path.is_file() else nullcontext(()) as lines:
        for line, _ in zip(lines, range(MOST_PAIRS)):
            record = json.loads(line)
            given = iter(record.get("scores", ()))
            sides = [key for key in ("chosen", "rejected", "completion") if key in record]
            parts = [("prompt", None), *((key, next(given, None)) for key in sides)]
            cards.append([(key.capitalize(), _text(record[key]), score) for key, score in parts])
    return cards


def _text(text: Any) -> str:
    text = text_of(text)
    return text[:MOST_CHARS] + (" …" if len(text) > MOST_CHARS else "")
