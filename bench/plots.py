"""Plots of benchmark rows, PNG and SVG: time, memory and share of the limit, and error against time.

    fastpref bench plots bench/results/*.json      draws them again, into plots/ beside each file

Colours are Okabe and Ito's, which colour-blind readers tell apart; names stand at the lines and bars they belong to.
Needs matplotlib, imported when something is drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .problem import LOGITS
from .records import Results, cell_of, on_gpu, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
# Okabe and Ito (2008); fastpref has the strongest.
COLOURS = {
    "fastpref": "#0072b2", "fastpref-rank1": "#00416b", "naive": "#e69f00", "naive_all": "#d55e00",
    "naive_compiled": "#8c6d1f",
    "torch_lce": "#009e73", "trl": "#cc79a7", "liger": "#56b4e9", "cce": "#5b5b5b", "quack": "#7a5195",
    "unsloth-zoo": "#a6761d",
    "padded": "#e69f00", "packed": "#009e73", "gathered": "#e69f00",
}
BACKENDS = {"reference": "#8a8a8a", "native": "#0072b2", "triton": "#009e73", "cuda": "#e69f00"}
MARKERS = {"fastpref": "o", "naive": "s", "naive_all": "D", "torch_lce": "^", "trl": "v", "liger": "P", "gathered": "s"}
TITLES = {
    "naive": "naive", "naive_all": "naive, prompts too", "naive_compiled": "torch.compile",
    "torch_lce": "torch linear_cross_entropy", "trl": "TRL", "liger": "Liger", "cce": "Cut Cross-Entropy",
    "gathered": "W gathered (FSDP)",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "text.color": INK, "figure.facecolor": "white", "axes.facecolor": "white",
    "savefig.facecolor": "white", "svg.hashsalt": "fastpref", "axes.axisbelow": True,
}
SWEPT = {"rows": "N", "vocab": "V", "length": "N", "pairs": "pairs", "ranks": "ranks"}
AXES = {"N": "scored rows", "V": "vocabulary", "pairs": "pairs", "ranks": "ranks"}
LIMIT = {"rows": "copy_ of as many bytes", "step": "trunk, bare GEMMs, optimiser"}


def of_results(results: Results) -> list[Path]:
    """Draws what a result file holds into `plots/` beside it. Nothing without a file, rows or matplotlib."""
    return [] if results.path is None or not results.rows else _draw(results.path)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastpref bench plots", description="Draws the plots of result files again.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="<date>-<device>-<benchmark>.json")
    for path in parser.parse_args(arguments).files:
        for plot in _draw(path):
            print(plot)
    return 0


def _draw(path: Path) -> list[Path]:
    rows = read(path)
    if not any(row["ms_median"] or row["status"] == "planned" for row in rows):
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib (pip install matplotlib)")
        return []
    folder, found = path.parent / "plots", []
    for name, figure in of_rows(rows).items():
        found.append(save(figure, folder / f"{path.stem}-{name}"))
    return found


def styled(draw: Callable[[Sequence[dict[str, Any]]], Figure], rows: Sequence[dict[str, Any]]) -> Figure:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return draw(rows)


def save(figure: Figure, path: Path, description: str = "", *, png: bool = True) -> Path:
    """`path`.svg and `path`.png; the same bytes for the same figure. description: kept in the SVG."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None} | ({"Description": description} if description else {})
        figure.savefig(path.parent / f"{path.name}.svg", bbox_inches="tight", pad_inches=0.12, metadata=metadata)
        if png:
            figure.savefig(path.parent / f"{path.name}.png", bbox_inches="tight", pad_inches=0.12, dpi=144)
    return path.parent / f"{path.name}.svg"


def of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Figures by name, as the rows' benchmark wants them; none of `train`, whose rows have no limit beside them."""
    benchmark = rows[0]["benchmark"]
    if benchmark == "train":
        return {}
    timed = [row for row in rows if row["ms_median"]]
    if benchmark.startswith("sweep-"):
        return _sweep(rows, SWEPT[benchmark.removeprefix("sweep-")])
    if benchmark == "attention":
        return {"speedup": styled(speedup, timed)} if timed else {}
    found = {"share": styled(share, timed)} if timed and benchmark != "loss" else {}
    if benchmark != "loss" and any(row.get("peak_extra_mib") for row in timed):
        found["memory"] = styled(memory, timed)
    if benchmark == "head" and len({row["N"] for row in timed}) > 1:
        found |= {f"{name}-n": figure for name, figure in _sweep(timed, "N").items()}
    if benchmark == "loss":
        for dtype in dict.fromkeys(row["dtype"] for row in timed):
            found[f"errors-{dtype}"] = styled(errors, [row for row in timed if row["dtype"] == dtype])
    if benchmark in ("head", "loss") and timed:
        found["error-time"] = styled(error_time, timed)
    return found


def title_of(impl: str) -> str:
    return TITLES.get(impl, impl)


def _name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """With no more than what tells an implementation's rows apart."""
    alike = [other for other in rows if other["impl"] == row["impl"]]
    parts = [title_of(row["impl"])]
    for field, form in (("backend", "{}"), ("budget_mib", "{:.4g} MiB"), ("logits_dtype", "{} logits")):
        if len({other[field] for other in alike}) > 1 and row[field]:
            parts.append(form.format(row[field]))
    return " ".join(parts)


def subject(row: dict[str, Any]) -> str:
    """Of a panel: what its rows have in common."""
    if row["benchmark"] == "rows":
        parts = [row["op"], f"{row['N']} x {row['V']}", f"{row['logits_dtype']} to {row['dtype']}", row.get("l2", "")]
        parts[-1] += " L2" if parts[-1] else ""
    elif row["benchmark"] == "attention":
        parts = [row["model"], f"{row['layers']} layers", row["dtype"], f"prompt / response {row['prompt_ratio']:g}"]
    else:
        loss = f"{row['loss'].upper()} {row['op']}"
        parts = [row.get("model", ""), loss, row["dtype"], f"N {row['N']:,}, H {row['H']:,}, V {row['V']:,}"]
    parts += [f"softcap {row['softcap']:g}" if row["softcap"] else ""]
    parts += [f"{row['prompt_share']:.0%} prompt" if row["prompt_share"] else ""]
    parts += [f"{row['logits']} logits" if row["logits"] != "trained" else ""]
    return ", ".join(part for part in parts if part)


def where(rows: Sequence[dict[str, Any]]) -> str:
    """The hardware that the rows come from, as a caption."""
    found = []
    for row in rows:
        kind = "GPU" if on_gpu(row) else f"CPU, {row['threads']} threads"
        found.append(f"{row['device']} ({kind}), torch {row['torch']}")
    return "; ".join(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------------------------
# Bars: share of the limit, memory
# ---------------------------------------------------------------------------------------------------------------------


def share(rows: Sequence[dict[str, Any]]) -> Figure:
    """Roofline share: the limit's time over an implementation's."""
    limit = LIMIT.get(rows[0]["benchmark"], "bare GEMMs")
    return _bars(
        rows, lambda row: 100 / row["ratio"], lambda row: f"{100 / row['ratio']:.0f} %, {_ms(row['ms_median'])}",
        f"share of the limit's rate, % ({limit} = 100)", mark=100.0,
    )


def memory(rows: Sequence[dict[str, Any]]) -> Figure:
    return _bars(
        rows, lambda row: row["peak_extra_mib"], lambda row: _mib(row["peak_extra_mib"]),
        "peak memory beyond inputs and gradients, MiB",
    )


def speedup(rows: Sequence[dict[str, Any]]) -> Figure:
    """Of the trunk, over padded batches."""
    return _bars(
        rows, lambda row: row["speedup"], lambda row: f"{row['speedup']:.2f} x, {_ms(row['ms_median'])}",
        "speed-up over padded batches", mark=1.0,
    )


def _bars(
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    text: Callable[[dict[str, Any]], str],
    xlabel: str,
    mark: float | None = None,
) -> Figure:
    """A panel per cell, two side by side; zero-based bars with their numbers."""
    cells: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(_panel(row), []).append(row)
    panels = list(cells.values())
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    tallest = [max(len(panel) for panel in panels[i * columns : (i + 1) * columns]) for i in range(lines)]
    figure, axes = _grid(lines, columns, width=4.9 * columns, heights=[0.23 * rows + 0.62 for rows in tallest])
    for number, (panel, ax) in enumerate(zip(panels, axes)):
        line = number // columns
        beside = panels[line * columns : (line + 1) * columns] if mark is None else panels
        end = max(mark or 0.0, *(value(row) for each in beside for row in each))
        names = [row["backend"] if row["benchmark"] == "rows" else _name(row, panel) for row in panel]
        values = [value(row) for row in panel]
        kernels = panel[0]["benchmark"] == "rows"
        colours = [BACKENDS[row["backend"]] if kernels else COLOURS.get(row["impl"], FAINT) for row in panel]
        ax.barh(range(len(panel)), values, color=colours, height=0.68)
        ax.set_yticks(range(len(panel)), names)
        for tick, row in zip(ax.get_yticklabels(), panel):
            tick.set_fontweight("bold" if row["impl"] == "fastpref" and not kernels else "normal")
        ax.set_ylim(tallest[line] - 0.4, -0.6)
        ax.set_xlim(0, end * 1.3)
        ax.tick_params(axis="y", length=0)
        for i, row in enumerate(panel):
            place = values[i] if mark is None else end  # else the mark would cross them
            ax.annotate(text(row), (place, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if mark is not None:
            ax.axvline(mark, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
            if mark == 100:
                ax.set_xticks([0, 25, 50, 75, 100])
        ax.grid(axis="x", color=GRID)
        device = f"{panel[0]['device']}: " if len({row["device"] for row in rows}) > 1 else ""
        ax.set_title("\n".join(textwrap.wrap(device + subject(panel[0]), 62)))
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax in axes[: len(panels)][-columns:]:
        ax.set_xlabel(xlabel)
    _caption(figure, rows)
    return figure


def _panel(row: dict[str, Any]) -> Any:
    """Rows of one machine and cell; of row kernels also one dtype of the logits."""
    logits = row["logits_dtype"] if row["benchmark"] == "rows" else ""
    return row["device"], row["threads"], cell_of(row), logits


# ---------------------------------------------------------------------------------------------------------------------
# Lines: time, memory and share as one size grows
# ---------------------------------------------------------------------------------------------------------------------


def _sweep(rows: Sequence[dict[str, Any]], x: str) -> dict[str, Figure]:
    def lines(y: str, ylabel: str) -> Figure:
        return styled(lambda rows: _lines(rows, x, y, ylabel), rows)

    found = {}
    if any(row["ms_median"] for row in rows):
        found["time"] = lines("ms_median", "time of a step, ms")
        found["share"] = lines("ratio", "share of the bare GEMMs' rate, %")
    if any(row["peak_extra_mib"] or row["plan_mib"] for row in rows):
        found["memory"] = lines("peak_extra_mib", "peak memory beyond inputs and gradients, MiB")
    return found


def _lines(rows: Sequence[dict[str, Any]], x: str, y: str, ylabel: str) -> Figure:
    """A panel per dtype and whatever else is not swept."""
    swept = ("N", "pairs") if x in ("N", "pairs") else (x,)
    panels: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(tuple(pair for pair in cell_of(row) if pair[0] not in swept), []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _grid(lines, columns, width=6.1 * columns, heights=[3.6] * lines)
    for panel, ax in zip(panels.values(), axes):
        ends = []
        for name in dict.fromkeys(_name(row, panel) for row in panel):
            some = sorted((row for row in panel if _name(row, panel) == name and row[y]), key=lambda row: row[x])
            impl = next(row["impl"] for row in panel if _name(row, panel) == name)
            colour, width = COLOURS.get(impl, FAINT), 2.2 if impl == "fastpref" else 1.4
            if some:
                xs, ys = [row[x] for row in some], [100 / row[y] if y == "ratio" else row[y] for row in some]
                marker = MARKERS.get(impl, "x")
                ax.plot(xs, ys, color=colour, marker=marker, markersize=4.5, linewidth=width, zorder=3)
                ends.append((xs[-1], ys[-1], name, colour))
                if y == "ms_median":
                    low, high = ([row[each] for row in some] for each in ("ms_p10", "ms_p90"))
                    ax.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
            planned = sorted(
                (row for row in panel if _name(row, panel) == name and row["plan_mib"]), key=lambda row: row[x]
            )
            if y == "peak_extra_mib" and planned and (len(planned) > len(some) or not some):
                xs, ys = [row[x] for row in planned], [row["plan_mib"] for row in planned]
                ax.plot(xs, ys, color=colour, linewidth=1.2, linestyle=(0, (2, 2)), zorder=2)
                ends = [end for end in ends if end[2] != name]
                ends.append((xs[-1], ys[-1], f"{name}: planned (dotted)", colour))
        limits = sorted({(row[x], row["ms_limit"]) for row in panel if row["impl"] == "fastpref" and row["ms_limit"]})
        limits = limits or sorted({(row[x], row["ms_limit"]) for row in panel if row["ms_limit"]})
        if y == "ms_median" and limits:
            ax.plot(*zip(*limits), color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=4)
            ends.append((*limits[-1], "bare GEMMs: the limit", INK))
        ax.set_xscale("log", base=2)
        if y == "ratio":
            ax.set_ylim(0, 112)
            ax.axhline(100, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            ax.annotate("bare GEMMs: the limit", (0, 100), (4, 3), xycoords=("axes fraction", "data"),
                        textcoords="offset points", fontsize=8)
        else:
            ax.set_yscale("log")
            _plain_log_ticks(ax.yaxis)
        values = sorted({row[x] for row in panel if row[y] or row["status"] == "planned"})
        ax.set_xticks(values, _tick_labels(values))
        ax.minorticks_off()
        ax.grid(color=GRID)
        ax.set_xlabel(AXES[x])
        ax.set_ylabel(ylabel)
        ax.set_title("\n".join(textwrap.wrap(_without(subject(panel[0]), x), 72)))
        _label_ends(ax, ends)
    for ax in axes[len(panels) :]:
        ax.remove()
    _caption(figure, rows)
    return figure


def _without(title: str, x: str) -> str:
    """A panel's title without the size that is swept."""
    return ", ".join(part for part in title.split(", ") if not part.startswith(f"{'N' if x == 'pairs' else x} "))


def _label_ends(ax: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Names right of the plot at the height of their lines' ends, pushed apart where they would touch."""
    to_axes = ax.transData + ax.transAxes.inverted()
    placed = sorted((float(to_axes.transform((x, y))[1]), x, y, name, colour) for x, y, name, colour in ends)
    heights = _apart([height for height, *_ in placed], 0.062, 0.0, 1.0)
    for height, (_, x, y, name, colour) in zip(heights, placed):
        ax.annotate(
            name, (x, y), (1.025, height), textcoords="axes fraction", color=colour, va="center", fontsize=8.5,
            fontweight="bold" if name.startswith("fastpref") else "normal",
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.7, shrinkA=1, shrinkB=3),
        )


def _pair(values: Iterable[float]) -> tuple[float, float]:
    first, second = map(float, values)
    return first, second


def _apart(values: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as a sweep up and a sweep down need to be `least` apart."""
    found = [max(value, low) for value in values]
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + least)
    if found and found[-1] > high:
        found[-1] = high
        for i in range(len(found) - 2, -1, -1):
            found[i] = min(found[i], found[i + 1] - least)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Dots: errors, alone and against time
# ---------------------------------------------------------------------------------------------------------------------

ERRORS = {
    "logp_max_err": "log-prob, worst, nats",
    "dx_rel_err": "gradient of hidden, relative",
    "dw_rel_err": "gradient of weight, relative",
}
SEQUENCE = "* mean over the worst sequence, where no tokens are shown"


def errors(rows: Sequence[dict[str, Any]]) -> Figure:
    """Panels: kinds of logits down, errors across; a dot per implementation."""
    kinds = [kind for kind in LOGITS if any(row["logits"] == kind for row in rows)]
    shown = [name for name in ERRORS if any(row[name] for row in rows)]
    names = list(dict.fromkeys(_name(row, rows) for row in rows))
    figure, axes = _grid(len(kinds), len(shown), 3.3 * len(shown) + 1.2, [0.2 * len(names) + 0.55] * len(kinds))
    for i, kind in enumerate(kinds):
        for j, error in enumerate(shown):
            ax = axes[i * len(shown) + j]
            for row in rows:
                if row["logits"] == kind and row[error] is not None:
                    y, value = names.index(_name(row, rows)), max(float(row[error]), 1e-9)
                    marker, colour = MARKERS.get(row["impl"], "o"), COLOURS.get(row["impl"], FAINT)
                    ax.plot(value, y, marker, color=colour, markersize=6)
                    text = f"{row[error]:.1e}{_of_sequence(row, error)}"
                    ax.annotate(text, (value, y), (7, 0), textcoords="offset points", va="center", fontsize=7)
            ax.set_xscale("log")
            found = [row[error] for row in rows if row["logits"] == kind and row[error]] or [1e-3]
            low, high = math.log10(min(found)) - 0.1, math.log10(max(found)) + 0.6
            ax.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.set_yticks(range(len(names)), names if j == 0 else [""] * len(names))
            ax.tick_params(axis="y", length=0)
            ax.grid(color=GRID)
            ax.minorticks_off()
            ax.set_title(f"{kind} logits: {ERRORS[error]}", fontsize=8.5)
    _caption(figure, rows, f"{rows[0]['dtype']}, against fp64; {SEQUENCE}; ")
    return figure


def _of_sequence(row: dict[str, Any], error: str) -> str:
    return "*" if error == "logp_max_err" and row["logp_err_of"] == "sequence" else ""


def error_time(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error against time, a line of panels per dtype: the first cell of each, on logits like a trained model's."""
    rows = [row for row in rows if row["logits"] == "trained"] or list(rows)
    shown = [name for name in ERRORS if any(row[name] for row in rows)]
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["dtype"], [])
        if not cells[row["dtype"]] or cell_of(cells[row["dtype"]][0]) == cell_of(row):
            cells[row["dtype"]].append(row)
    figure, axes = _grid(len(cells), len(shown), 4.2 * len(shown), [3.0] * len(cells))
    for i, cell in enumerate(cells.values()):
        for j, error in enumerate(shown):
            ax, points = axes[i * len(shown) + j], []
            ax.set_xscale("log")
            ax.set_yscale("log")
            for row in cell:
                if row[error]:
                    colour, marker = COLOURS.get(row["impl"], FAINT), MARKERS.get(row["impl"], "o")
                    ax.plot(row["ratio"], row[error], marker, color=colour, markersize=7, zorder=3)
                    name = _name(row, cell) + _of_sequence(row, error)
                    points.append((row["ratio"], float(row[error]), name, colour))
            ax.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            ax.margins(x=0.12, y=0.15)
            _plain_log_ticks(ax.xaxis)
            _few_log_ticks(ax.yaxis)
            ax.grid(color=GRID)
            ax.set_ylabel(f"error: {ERRORS[error]}")
            if i == len(cells) - 1:
                ax.set_xlabel("time / bare GEMMs (dashed: the limit)")
            if j == 0:
                ax.set_title(subject(cell[0]), fontsize=9)
            _label_points(ax, points)
    _caption(figure, rows, f"{SEQUENCE}; ")
    return figure


def _label_points(ax: Axes, points: Iterable[tuple[float, float, str, str]]) -> None:
    """Names beside their points, towards the middle of the plot, pushed apart where they would touch."""
    to_axes = ax.transData + ax.transAxes.inverted()
    placed = sorted((*_pair(to_axes.transform((x, y))[::-1]), name, colour) for x, y, name, colour in points)
    heights = _apart([each[0] for each in placed], 0.075, 0.03, 0.97)  # of both sides: they meet in the middle
    for height, (y, x, name, colour) in zip(heights, placed):
        side = x < 0.55
        ax.annotate(
            name, (x, y), (x + (0.045 if side else -0.045), height), xycoords="axes fraction", color=colour,
            va="center", ha="left" if side else "right", fontsize=8,
            fontweight="bold" if name.startswith("fastpref") else "normal",
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.7, shrinkA=0, shrinkB=2),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Common
# ---------------------------------------------------------------------------------------------------------------------


def _grid(lines: int, columns: int, width: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(width, sum(heights) + 0.4), layout=layout)
    return figure, list(figure.subplots(lines, columns, squeeze=False, height_ratios=list(heights)).flat)


def _caption(figure: Figure, rows: Sequence[dict[str, Any]], before: str = "") -> None:
    figure.supxlabel(before + where(rows), fontsize=8, color=FAINT, x=0.01, ha="left")


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / max(low, 1e-9) < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(LogLocator(subs=()))


def _few_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9) if high / low < 50 else LogLocator(numticks=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


def _tick_labels(values: Sequence[int]) -> list[str]:
    """Of ascending values on a logarithmic axis; none where it would run into the one before."""
    labels, least = [_short(value) for value in values], math.log(max(values[-1] / values[0], 2)) / 9
    shown = [0]
    for i in range(1, len(values)):
        if math.log(values[i] / values[shown[-1]]) >= least * max(len(labels[i]), len(labels[shown[-1]])) / 4:
            shown.append(i)
    return [label if i in shown else "" for i, label in enumerate(labels)]


def _short(value: int) -> str:
    """1k is 1024, as vocabularies and rows are counted here."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % (size // 2 if size > value // 8 else 1) == 0:
            return f"{value / size:.4g}{unit}"
    return str(value)


def _ms(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1e4 else f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _mib(value: float) -> str:
    return f"{value / 1024:.1f} GiB" if value >= 10240 else f"{value:.0f} MiB"
