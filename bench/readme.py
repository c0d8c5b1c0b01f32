"""The results of README.md: tables and two plots, made from the rows in bench/results and from nothing else.

    fastpref bench readme            writes them (`make readme-bench`)
    fastpref bench readme --check    exits with 1 where README, plots and rows differ

Of every cell the newest measurement counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fastpref.plan import DEFAULT_BUDGET

from . import plots
from .gates import CPU_LIMITS, SLACK, gpu_limit
from .head import CPU_SHAPES, LARGE, MAIN, OTHERS
from .peers import MIB, PEERS
from .problem import Shape
from .records import cell_of, on_gpu, read

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- results: written by `make readme-bench` from bench/results -->", "<!-- /results -->"
PLOTS = {
    "readme-share": ("Share of the bare GEMMs' rate", plots.share),
    "readme-memory": ("Peak memory beyond inputs and gradients", plots.memory),
}
TRAINING = """\
DPO steps of the trainer on random weights and tokens with UltraFeedback's lengths, each in a process that may take no
more than the card it stands for; peers on the same pairs may take the whole device (`fastpref bench train`)."""
WAITING = " What is said of GPUs is arithmetic; `make gpu-check` measures it (`bench/README.md`, last section)."
LEGEND = """\
A DPO step of the head (log-probs, loss, gradients of hidden states and weight) over N scored rows. Times are ratios to
the three bare GEMMs of the same shapes, interleaved in the same run; memory is the peak beyond inputs and gradients.
Share of the limit: the GEMMs' time over fastpref's. Protocol: `bench/README.md`."""
SETTING = ("device", "threads", "cell", "checkpointing")  # of `bench train`
CELLS = (
    [("CPU", shape, dtype) for shape in CPU_SHAPES for dtype in ("fp32", "bf16")]
    + [("GPU", shape, "bf16") for shape in (MAIN, LARGE, *OTHERS)]
)


def headline(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of DPO steps, a cell after the other; of fastpref the default budget and dtype of logits."""
    newest: dict[Any, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        cells: dict[Any, list[dict[str, Any]]] = {}
        for row in read(path):
            if (row["benchmark"], row["op"], row["loss"], row["logits"]) == ("head", "step", "dpo", "trained"):
                cells.setdefault((row["device"], row["threads"], cell_of(row)), []).append(row)
        for cell, rows in cells.items():
            if cell not in newest or newest[cell][0]["date"] < rows[0]["date"]:
                newest[cell] = rows
    order = ["fastpref", *PEERS]
    found = []
    for rows in newest.values():
        kept: dict[str, dict[str, Any]] = {}
        for row in rows:  # the default backend stands first
            if row["impl"] not in kept and (row["impl"] != "fastpref" or _is_default(row)):
                kept[row["impl"]] = row
        if "fastpref" in kept:
            found.append(sorted(kept.values(), key=lambda row: order.index(row["impl"])))
    found.sort(key=lambda rows: _place(rows[0]))
    return [row for rows in found for row in rows]


def _is_default(row: dict[str, Any]) -> bool:
    budget = DEFAULT_BUDGET["cuda" if on_gpu(row) else "cpu"] / MIB
    return row["budget_mib"] == budget and row["logits_dtype"] in ("fp32", None if on_gpu(row) else row["dtype"])


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    size = (row["V"] * row["H"], row["N"], row["prompt_share"], row["dtype"] != "fp32")
    return not on_gpu(row), row["device"], row["threads"], *size


def _hardware(row: dict[str, Any]) -> str:
    return f"GPU: {row['device']}" if on_gpu(row) else f"CPU: {row['device']}, {row['threads']} threads"


def _shape(row: dict[str, Any]) -> str:
    extra = f", {row['prompt_share']:.0%} prompt" if row["prompt_share"] else ""
    extra += f", softcap {row['softcap']:g}" if row["softcap"] else ""
    return f"{row['N']} x {row['H']} x {row['V']}{extra}".replace("%", " %")


def _entry(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] in ("missing", "skipped"):
        return "-"
    if row["ratio"] is None:
        return {"oom": "out of memory"}.get(row["status"], row["status"])
    memory = "" if row["peak_extra_mib"] is None else f", {row['peak_extra_mib']:.0f} MiB"
    return f"{row['ratio']:.2f}{memory}"


def trained(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of `bench train`, the newest of each cell, checkpointing and implementation."""
    found: dict[Any, dict[str, Any]] = {}
    for row in (row for path in sorted(folder.glob("*.json")) for row in read(path) if row["benchmark"] == "train"):
        key = not on_gpu(row), *(row[name] for name in (*SETTING, "impl"))
        if row["cell"] != "quick" and row["status"] not in ("skipped", "missing"):
            if key not in found or found[key]["date"] < row["date"]:
                found[key] = row
    return [found[key] for key in sorted(found)]


def training_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown, a line per cell and checkpointing, which everybody in it had."""
    lines = ["| hardware | model, weights and optimiser | card | pairs/s | TRL's | naive loop's | MFU | peak (plan) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for _, group in groupby(rows, key=lambda row: [row[name] for name in SETTING]):
        found = {row["impl"]: row for row in group}
        one, ours = next(iter(found.values())), found.get("fastpref")
        speeds = [_speed(found.get(name)) for name in ("fastpref", "trl", "naive")]
        memory, mfu = "-", "-"
        if ours and ours["peak_mib"] is not None:
            memory = f"{ours['peak_mib'] / 1024:.1f} GiB"
            memory += f" ({ours['plan_mib'] / 1024:.1f})" if ours["plan_mib"] else ""
        if ours and ours["mfu"]:
            mfu = f"{ours['mfu']:.0%}".replace("%", " %")
        card = f"{one['card_gb']:g} GB" if one["card_gb"] else "-"
        what = f"{one['model']}, {one['recipe'].strip()}, checkpointing {one['checkpointing']}"
        first = f"**{speeds[0]}**" if ours else speeds[0]
        lines.append(f"| {' | '.join((_hardware(one), what, card, first, *speeds[1:], mfu, memory))} |")
    return lines


def _speed(row: dict[str, Any] | None) -> str:
    if row is None or row["pairs_per_s"] is None:
        return "-" if row is None else {"oom": "out of memory"}.get(row["status"], row["status"])
    return f"{row['pairs_per_s']:.3g}" + (" (wrong)" if row["status"] == "wrong" else "")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown, a line per cell."""
    impls = [name for name in ("fastpref", *PEERS) if any(row["impl"] == name and row["ratio"] for row in rows)]
    cells: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((_hardware(row), _shape(row), row["dtype"]), {})[row["impl"]] = row
    names = [f"**{name}**" if name == "fastpref" else plots.title_of(name) for name in impls]
    lines = ["| hardware | N x H x V | dtype | share of the limit | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(impls))
    for (hardware, shape, dtype), found in cells.items():
        ratio = found["fastpref"]["ratio"]
        share = "-" if ratio is None else f"**{100 / ratio:.0f} %**"
        entries = " | ".join(_entry(found.get(name)) for name in impls)
        lines.append(f"| {hardware} | {shape} | {dtype} | {share} | {entries} |")
    return lines


def _sources(rows: Sequence[dict[str, Any]]) -> str:
    def every(values: Sequence[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values if value}))

    ran = [row for row in rows if row["impl"] != "fastpref" and row["version"]]
    peers = [f"{plots.title_of(row['impl'])} {row['version']}" for row in ran]
    peers = [name for name in peers if "naive" not in name and "torch" not in name]
    return (
        f"Measured {every([row['date'][:10] for row in rows])} at revision {every([row['revision'] for row in rows])}; "
        f"torch {every([row['torch'] for row in rows])}{', ' + every(peers) if peers else ''}."
    )


def _unmeasured(rows: Sequence[dict[str, Any]]) -> str:
    """Cells of the standard runs that nobody has measured yet."""

    def key(kind: str, shape: Shape, dtype: str) -> tuple[Any, ...]:
        return kind, shape.rows, shape.hidden, shape.vocab, shape.prompt_share, dtype

    sizes = ("N", "H", "V", "prompt_share", "dtype")
    there = {("GPU" if on_gpu(row) else "CPU", *(row[name] for name in sizes)) for row in rows if row["ratio"]}
    left: dict[str, dict[str, list[str]]] = {"GPU": {}, "CPU": {}}
    for kind, shape, dtype in CELLS:
        if key(kind, shape, dtype) not in there:
            prompt = f", {shape.prompt_share:.0%} prompt".replace("%", " %") if shape.prompt_share else ""
            left[kind].setdefault(f"{shape.rows} x {shape.hidden} x {shape.vocab}{prompt}", []).append(dtype)
    lines = []
    for kind, shapes in left.items():
        if sum(map(len, shapes.values())) == sum(cell[0] == kind for cell in CELLS):
            lines.append(f"{kind}: not measured yet." + (WAITING if kind == "GPU" else ""))
        elif shapes:
            cells = "; ".join(f"{shape} ({', '.join(dtypes)})" for shape, dtypes in shapes.items())
            lines.append(f"{kind}, not measured yet: {cells}.")
    return " ".join(lines)


def _missed(rows: Sequence[dict[str, Any]]) -> str:
    """Cells where fastpref is above its own gate, or behind a peer."""
    found = []
    for row in (row for row in rows if row["impl"] == "fastpref" and row["ratio"]):
        limit = CPU_LIMITS.get(row["dtype"])
        if on_gpu(row):
            limit = SLACK + gpu_limit("step", "fp32", row["N"], row["H"], row["V"], row["budget_mib"], row["ms_limit"])
        missed = [f"the aim is {limit:.2f}"] if limit and row["ratio"] > limit else []
        for peer in rows:
            alike = all(peer[name] == row[name] for name in ("device", "threads")) and cell_of(peer) == cell_of(row)
            if alike and peer["ratio"] and peer["ratio"] < row["ratio"]:
                missed.append(f"{plots.title_of(peer['impl'])} takes {peer['ratio']:.2f}")
        if missed:
            found.append(f"{_shape(row)}, {row['dtype']}: {row['ratio']:.2f}, {', '.join(missed)}")
    return f"Aims missed: {'; '.join(found)}." if found else ""


def block(rows: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]] = ()) -> str:
    """What stands between the markers."""
    lines = [BEGIN, ""]
    if rows:
        lines += [LEGEND, "", *table(rows), "", _sources(rows)]
    if missed := _missed(rows):
        lines += ["", missed]
    if left := _unmeasured(rows):
        lines += ["", left]
    for name, (title, _) in PLOTS.items() if rows else ():
        lines += ["", f"![{title}](bench/results/plots/{name}.svg)"]
    if training:
        lines += ["", TRAINING, "", *training_table(training), "", _sources(training)]
    if not any(on_gpu(row) for row in training):
        lines += ["", "Training steps within 80, 48 and 24 GB on a GPU (`fastpref bench train`): not measured yet."]
    return "\n".join([*lines, "", END])


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """Of what the plots show; they carry it, because two versions of matplotlib draw different bytes."""
    return "rows sha256:" + hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def with_block(text: str, new: str) -> str:
    """README's text with `new` between the markers, which it contains."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md takes one line {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    return before + new + rest.split(END)[1]


def differences(readme: Path = README, results: Path = RESULTS) -> list[str]:
    """What does not follow from the rows: one line each."""
    rows, text = headline(results), readme.read_text()
    shown = with_block(text, block(rows, trained(results))) == text
    found = [] if shown else [f"{readme.name} does not show what {results} holds"]
    for name in PLOTS if rows else ():
        path = results / "plots" / f"{name}.svg"
        if not path.exists() or digest(rows) not in path.read_text():
            found.append(f"{path} was not drawn from what {results} holds")
    return found


def write(readme: Path = README, results: Path = RESULTS) -> None:
    rows = headline(results)
    readme.write_text(with_block(readme.read_text(), block(rows, trained(results))))
    timed = [row for row in rows if row["ratio"]]
    for name, (_, draw) in PLOTS.items() if timed else ():
        plots.save(plots.styled(draw, timed), results / "plots" / name, digest(rows), png=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpref bench readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if not options.check:
        write()
    found = differences()
    for line in found:
        print(f"{line}; `make readme-bench` writes both")
    return int(bool(found))
