"""What rounds came to: lines while they run, the table at their end, and report.html for all of them.

The page reads files alone (summary.json, config.yaml, pairs.jsonl), so it can be made again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from fastpref.files import write_text
from fastpref.train.chart import Line, line_chart, number, percent
from fastpref.train.display import Display, duration
from fastpref.train.report import html_page

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
    labels = list(dict.fromkeys(label for row in rows for label, value, _ in _columns(row) if value is not None))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fits 80 columns
    held_out = [f"held-out\n{label}" for label in labels]
    for head in ("round", "prompts", _noun(rows[-1]), "sampled\nreward", *held_out, "time"):
        table.add_column(head.replace("exact ", "exact\n"), justify="right")
    for row in rows:
        shown = {label: show(value) for label, value, show in _columns(row) if value is not None}
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
    rows = summary["rounds"]
    trained = [row for row in rows if (run_dir / _folder(row) / "train" / "report.html").is_file()]
    name = run_dir.resolve().name
    body = [
        f'<header><h1>{escape(name)}</h1><ul class="facts"><li>{len(rows)} rounds</li>'
        f"<li>{escape(str(summary.get('device', '')))}</li></ul></header>",
        _headlines(summary),
        f'<section><h2>Over the rounds</h2><div class="charts">{_charts(summary)}</div></section>',
        _table(summary, {row["round"] for row in trained}, (run_dir / "start" / "report.html").is_file()),
        _times(rows),
        _pairs(run_dir / _folder(rows[-1]) / "pairs.jsonl", rows[-1]["round"]),
        f"<details><summary>Configuration (config.yaml)</summary><pre>{escape(config.rstrip())}</pre></details>",
    ]
    path = run_dir / "report.html"
    write_text(path, html_page(f"{name} · fastpref rounds", body))
    return path


def _folder(row: Values) -> str:
    return f"round-{row['round']:03d}"


def _series(rows: Sequence[Values], label: str) -> list[tuple[float, float]]:
    """Of the start (round 0) and every round."""
    found = []
    for row in rows:
        value = next((value for name, value, _ in _columns(row) if name == label), None)
        if value is not None:
            found.append((float(row["round"]), float(value)))
    return found


def _headlines(summary: Values) -> str:
    rows = [summary["start"], *summary["rounds"]]
    cards = []
    for label, _, show in _columns(rows[-1]):
        points = _series(rows, label)
        if label == "KL" or len(points) < 2:
            continue
        before, after = points[0][1], points[-1][1]
        arrow = "▲" if after > before else "▼" if after < before else "="
        mood = "better" if after > before else "worse" if after < before else ""
        amount = f"{abs(100 * (after - before)):.1f} points" if show is percent else number(abs(after - before))
        cards.append(
            f'<div class="card number {mood}"><dt>Held-out {escape(label)}</dt><dd><strong>{show(after)}</strong>'
            f'<span class="change-by">{arrow} {amount} <span class="mood">{mood}</span></span>'
            f'<span class="was">before round 1: {show(before)}</span></dd></div>'
        )
    total = _total_seconds(summary["rounds"])
    cards.append(
        f'<div class="card number"><dt>Wall time</dt><dd><strong>{duration(total["total"])}</strong>'
        f'<span class="was">{escape(time_split(total).partition(" | ")[2])}</span></dd></div>'
    )
    return f'<dl class="numbers">{"".join(cards)}</dl>'


def _charts(summary: Values) -> str:
    rows = [summary["start"], *summary["rounds"]]
    rounds = summary["rounds"]
    last = next(label for label, _, _ in reversed(_columns(rows[-1])[:-1]))
    sampled = [(float(row["round"]), float(row["reward"])) for row in rounds if row["reward"] is not None]
    kept = [(float(row["round"]), float(row["pairs"])) for row in rounds]
    dropped = [(float(row["round"]), float(sum(row["dropped"].values()))) for row in rounds]
    rewards = [Line("held-out sample", _series(rows, "reward"), "eval", "marked")]
    if last.startswith("best of"):
        rewards.append(Line(f"held-out {last}", _series(rows, last), "rejected", "marked"))
    rewards.append(Line("sampled, as the round began", sampled, "train", "marked"))
    match = [Line("held-out", _series(rows, "exact match"), "eval", "marked")]
    kl = [Line("held-out", _series(rows, "KL"), "eval", "marked")]
    pairs = [Line("kept", kept, "chosen", "marked"), Line("dropped", dropped, "rejected", "marked")]
    return "".join((
        line_chart("Exact match of greedy generations", match, y_label="held-out prompts", x_label="round", shares=True,
                   note="Round 0 is the model before the first."),
        line_chart("Reward", rewards, y_label="score, mean over responses", x_label="round"),
        line_chart("KL to the reference, on the data's responses", kl, y_label="nats per response", x_label="round"),
        line_chart("What pairing kept", pairs, y_label="pairs", x_label="round", from_zero=True),
    ))


def _table(summary: Values, linked: set[int], start_linked: bool) -> str:
    heads = ("sampled reward", "prompts", "responses", "empty", "duplicates", "failed", "cut", "offline", "pairs",
             "why no pair")
    rows = [summary["start"], *summary["rounds"]]
    labels = list(dict.fromkeys(label for row in rows for label, value, _ in _columns(row) if value is not None))
    lines = []
    for row in rows:
        shown = {label: show(value) for label, value, show in _columns(row) if value is not None}
        if not row["round"]:
            first = '<a href="start/report.html">start</a>' if start_linked else "start"
            name, cells = first, [""] * len(heads)
        else:
            counts = row["counts"]
            href = f'<a href="{_folder(row)}/train/report.html">{row["round"]}</a>'
            name, cells = href if row["round"] in linked else str(row["round"]), [number(row["reward"])]
            cells += [f"{counts[key]:,}" for key in ("prompts", "responses", "empty", "duplicates", "failed", "cut")]
            why = ", ".join(f"{n:,} {reason}" for reason, n in row["dropped"].items())
            cells += [f"{row['offline']:,}", f"{row['pairs']:,}", escape(why)]
        cells = [name, *(shown.get(label, "") for label in labels), *cells]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    every = ["round", *(f"held-out {label}" for label in labels), *heads]
    return _section("Every round", "its number leads to its own report", every, lines)


def _section(title: str, note: str, heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section><h2>{title} <small>{note}</small></h2><div class="scroll">{table}</div></section>'


def _times(rows: Sequence[Values]) -> str:
    parts = [part for part in PARTS if any(row["seconds"].get(part) for row in rows)]
    lines = []
    for row in rows:
        total = row["seconds"]["total"]
        cells = [f"<td>{row['round']}</td>"]
        for part in parts:
            value = row["seconds"].get(part, 0.0)
            cells.append(f"<td>{number(value)} s ({100 * value / total:.0f}%)</td>")
        cells.append(f"<td>{number(total, 4)} s{' (went on)' if row['resumed'] else ''}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = "scoring and pairing are what sampling did not cover: they run beside it"
    return _section("Wall time", note, ["round", *parts, "total"], lines)


def _pairs(path: Path, last: int) -> str:
    """The first few examples of the last round, as text."""
    if not path.is_file():
        return ""
    cards = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(MOST_PAIRS)):
            record = json.loads(line)
            parts = [f"<div><h4>Prompt</h4><pre>{_clip(record['prompt'])}</pre></div>"]
            given = iter(record.get("scores", ()))
            for key in ("chosen", "rejected", "completion"):
                if key in record:
                    score = next(given, None)
                    title = key.capitalize() + ("" if score is None else f" <small>score {number(score)}</small>")
                    parts.append(f"<div><h4>{title}</h4><pre>{_clip(record[key])}</pre></div>")
            cards.append(f'<article class="card sample">{"".join(parts)}</article>')
    return f"<section><h2>Examples that round {last} trained on</h2>{''.join(cards)}</section>" if cards else ""


def _clip(text: Any) -> str:
    text = text if isinstance(text, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in text)
    return escape(text[:MOST_CHARS] + (" …" if len(text) > MOST_CHARS else ""))
