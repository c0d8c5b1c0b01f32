"""What rounds came to: lines while they run, the table at their end, and report.html for all of them.

The page, report/templates/rounds.html, is made of files alone (summary.json, config.yaml, pairs.jsonl), at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from fastpref.files import write_text
from fastpref.report.charts import Line, line_chart
from fastpref.report.metrics import number, percent
from fastpref.report.page import change_card
from fastpref.report.render import render
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
    name = f"round {values['round']}/{of}"
    if "kl_budget" in values:
        parts.append(f"KL budget of {values['kl_budget']['budget']:g} nats reached")
    return [f"{name} | {' | '.join(parts)}", *_results(name, values), f"{name} | {time_split(values['seconds'])}"]


def _results(name: str, values: Values) -> list[str]:
    found = [f"{label} {show(value)}" for label, value, show in _columns(values) if value is not None]
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


def _columns(values: Values) -> list[tuple[str, float | None, Any]]:
    """(label, value, how to show it) of what is known of a round's weights on held-out prompts."""
    after, best = values.get("after", {}), values.get("best_of_n", [])
    found: list[tuple[str, float | None, Any]] = [("exact match", after.get("exact_match"), percent)]
    found.append(("reward", best[0]["reward"] if best else None, number))
    if len(best) > 1:
        found.append((f"best of {best[-1]['n']}", best[-1]["reward"], number))
    return [*found, ("KL", after.get("kl"), number)]


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


def _total_seconds(rows: Sequence[Values]) -> dict[str, float]:
    return {part: sum(row["seconds"].get(part, 0.0) for row in rows) for part in (*PARTS, "total")}


# ---- the page --------------------------------------------------------------------------------------------------------


def write_page(run_dir: Path) -> Path:
    """Writes run_dir/report.html (atomically) from summary.json, and returns its path."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    rounds = summary["rounds"]
    rows = [summary["start"], *rounds]
    name = run_dir.resolve().name
    path = run_dir / "report.html"
    write_text(path, render(
        "rounds.html", title=f"{name} · fastpref rounds", name=name, device=summary.get("device", ""),
        cards=_headlines(rows), charts=_charts(rows), labels=_labels(rows), rows=[_row(run_dir, row) for row in rows],
        rounds=rounds, parts_of_time=[part for part in PARTS if any(row["seconds"].get(part) for row in rounds)],
        pairs=_pairs(run_dir / f"round-{rounds[-1]['round']:03d}" / "pairs.jsonl"), config=config.rstrip(),
    ))
    return path


def _labels(rows: Sequence[Values]) -> list[str]:
    """Of the columns in which a row has a value."""
    return list(dict.fromkeys(label for row in rows for label, value, _ in _columns(row) if value is not None))


def _shown(row: Values) -> dict[str, str]:
    return {label: show(value) for label, value, show in _columns(row) if value is not None}


def _row(run_dir: Path, row: Values) -> dict[str, Any]:
    """What the page's table says of a round; to: its own report, where it has one."""
    to = f"round-{row['round']:03d}/train/report.html" if row["round"] else "start/report.html"
    return {**row, "to": to if (run_dir / to).is_file() else "", "held_out": _shown(row)}


def _series(rows: Sequence[Values], label: str) -> list[tuple[float, float]]:
    """Of the start (round 0) and every round."""
    return [(float(row["round"]), float(value)) for row in rows for name, value, _ in _columns(row)
            if name == label and value is not None]


def _headlines(rows: Sequence[Values]) -> list[dict[str, Any]]:
    cards = []
    for label, _, show in _columns(rows[-1]):
        points = _series(rows, label)
        if label != "KL" and len(points) >= 2:
            cards.append(change_card(f"Held-out {label}", points[0][1], points[-1][1], show, "higher",
                                     "before round 1"))
    time, _, split = time_split(_total_seconds(rows[1:])).partition(" | ")
    return [*cards, {"label": "Wall time", "value": time, "was": split}]


def _charts(rows: Sequence[Values]) -> list[Markup]:
    """Against the round; 0 is the model before the first."""
    last = next(label for label, _, _ in reversed(_columns(rows[-1])[:-1]))

    def of_rounds(value: Callable[[Values], float | None]) -> list[tuple[float, float]]:
        found = [(float(row["round"]), value(row)) for row in rows[1:]]
        return [(x, float(y)) for x, y in found if y is not None]

    rewards = [Line("held-out sample", _series(rows, "reward"), "eval", "marked")]
    if last.startswith("best of"):
        rewards.append(Line(f"held-out {last}", _series(rows, last), "rejected", "marked"))
    rewards.append(Line("sampled, as the round began", of_rounds(lambda row: row["reward"]), "train", "marked"))
    pairs = [Line("kept", of_rounds(lambda row: row["pairs"]), "chosen", "marked"),
             Line("dropped", of_rounds(lambda row: sum(row["dropped"].values())), "rejected", "marked")]
    match, kl = ([Line("held-out", _series(rows, label), "eval", "marked")] for label in ("exact match", "KL"))
    chart = partial(line_chart, x_label="round", x_name="round")
    return [
        chart("Exact match of greedy generations", match, y_label="held-out prompts", shares=True,
              note="Round 0 is the model before the first."),
        chart("Reward", rewards, y_label="score, mean over responses"),
        chart("KL to the reference, on the data's responses", kl, y_label="nats per response", from_zero=True),
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
    text = text if isinstance(text, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in text)
    return text[:MOST_CHARS] + (" …" if len(text) > MOST_CHARS else "")
