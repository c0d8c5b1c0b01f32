"""Line and before/after charts as inline SVG. Knows where to draw what, not what a run is.

How it looks is in templates/ (line_chart.svg, change_chart.svg; colours, fonts and dashes are classes of style.css), so
one picture serves light, dark and print; a chart is a few kB of text and needs no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from markupsafe import Markup

from .metrics import number, percent
from .render import render

Point = tuple[float, float]
T = TypeVar("T")

# One unit is about one CSS pixel where the report is read, so that text has the same size in both formats.
SIZES = {"large": (520, 270), "small": (260, 175)}
DIGIT = {"large": 10.2, "small": 7.7}  # width of one in a tick label; a phone draws those of large charts at 16 px
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 44  # room for short tick labels; the legend is HTML and wraps by itself
MOST_POINTS = 300  # more than this cannot be told apart on a plot 444 units wide, and the file stays small
MOST_MARKERS = 60
MARKED = ("marked", "points")
KINDS = ("trace", "pale", "line", *MARKED)  # from the back to the front


@dataclass(frozen=True)
class Line:
    """One series. `role` is its colour, dash and marker (chosen, rejected, train, eval, ...); `kind` how it is drawn:
    "trace" (faint, unlabelled: the raw values behind a line), "line", "pale" (a line that stands back), "marked", or
    "points" (markers alone). errors: half the height of a bar through each point; of a marked line or of points."""

    label: str
    points: Sequence[Point]
    role: str
    kind: str = "line"
    errors: Sequence[float] = ()


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], about `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: each bin keeps its lowest and its highest in order, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    bins = most // 2
    kept: list[Point] = []
    for b in range(bins):
        part = points[b * len(points) // bins : (b + 1) * len(points) // bins]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += [low] if low == high else sorted((low, high))
    return kept


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _y_range(lines: Sequence[Line], include: Sequence[float]) -> tuple[float, float]:
    """Covers `include` and every line; of a raw trace only the middle 98 %, or one spike would flatten the rest."""
    values = list(include)
    for line in lines:
        ys = sorted(y for _, y in line.points)
        cut = len(ys) // 100 if line.kind == "trace" else 0
        values += ys[cut : len(ys) - cut][:: max(1, len(ys) - 2 * cut - 1)]  # lowest and highest
        values += [y + sign * e for (_, y), e in zip(line.points, line.errors) for sign in (-1, 1)]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        pad = 0.5 * abs(high) or 1.0
        return (0.0, high + pad) if high > 0 else (low - pad, high + pad)
    pad = 0.06 * (high - low)
    return (low - pad if low < 0 or low > 0.3 * high else 0.0), high + pad  # start at zero where that costs little


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "optimiser step",
    x_name: str = "step",
    note: str = "",
    shares: bool = False,
    from_zero: bool = False,
    guide: tuple[float, str] | None = None,
    size: str = "large",
) -> Markup:
    """A `<figure>`: heading, legend, axes, lines, and `note` below. `shares`: values in [0, 1], drawn as 0-100%.

    `guide` is a horizontal line (value, label), e.g. chance; `size` "large" or "small"; `x_name` is what a marker's
    tip calls x. Lines without points are left out; without any line, "" returns.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup()
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs), max(xs)
    whole = all(x == round(x) for x in xs)  # steps and rounds: there is no half of one
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = (-0.03, 1.03) if shares else _y_range(lines, [0.0] * from_zero + ([guide[0]] if guide else []))
    few = 5 if size == "large" else 4
    y_ticks = [(y, f"{100 * y:.0f}%" if shares else number(y, 4))
               for y in ((0.0, 0.25, 0.5, 0.75, 1.0) if shares else ticks(y_low, y_high, few))]
    x_ticks = [(x, number(x, 8)) for x in ticks(x_low, x_high, few) if x == round(x) or not whole]
    width, height = SIZES[size]
    left = max(LEFT, 10 + round(DIGIT[size] * max(len(text) for _, text in y_ticks)))
    right = width - max([RIGHT, *(round(DIGIT[size] * len(text) / 2) - 4 for _, text in x_ticks[-1:])])
    bottom = height - BOTTOM

    def at_x(x: float) -> float:
        return left + 6 + (x - x_low) / (x_high - x_low) * (right - left - 12)

    def at_y(y: float) -> float:  # a spike beyond the range runs along the frame
        return bottom - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (bottom - TOP)

    def drawn(line: Line) -> dict[str, Any]:
        marked = line.kind in MARKED
        points = spread(line.points, 4 * MOST_MARKERS) if marked else thin(line.points)
        path = "".join(f"{'L' if i else 'M'}{at_x(x):.1f} {at_y(y):.1f}" for i, (x, y) in enumerate(points))
        if len(points) == 1 and not marked:
            path += "h0.01"  # with round caps a single value is a dot
        errors = line.errors or [0.0] * len(line.points)
        return {
            "role": line.role, "kind": line.kind, "path": "" if line.kind == "points" else path,
            "marks": [
                {"x": at_x(x), "y": at_y(y), "error": (at_y(y - e), at_y(y + e)) if e else None,
                 "tip": f"{line.label}, {x_name} {number(x, 8 if x == round(x) else 4)}: "
                        f"{percent(y) if shares else number(y, 4)}"}
                for (x, y), e in (spread(list(zip(line.points, errors)), MOST_MARKERS) if marked else ())
            ],
        }

    at_guide = at_y(guide[0]) if guide else 0.0
    return render(
        "line_chart.svg", title=title, note=note, size=size, lines=lines, y_label=y_label, x_label=x_label,
        width=width, height=height, left=left, right=right, bottom=bottom,
        y_ticks=[(at_y(y), text) for y, text in y_ticks], x_ticks=[(at_x(x), text) for x, text in x_ticks],
        guide={"y": at_guide, "label": guide[1],  # its label on the side that has more room
               "below": -5 if at_guide > (TOP + bottom) / 2 else 14} if guide else None,
        drawn=[drawn(line) for line in sorted(lines, key=lambda line: KINDS.index(line.kind))],
    )


def change_chart(title: str, rows: Sequence[tuple[str, float, float]], *, note: str = "") -> Markup:
    """A `<figure>` of shares in [0, 1], one line per (label, before, after): a hollow dot and a full one."""
    if not rows:
        return Markup()
    labels, row_height, top, width = 150, 26, 12, SIZES["large"][0]

    def at(value: float) -> float:
        return labels + 8 + min(max(value, 0.0), 1.0) * (width - labels - 40)

    return render(
        "change_chart.svg", title=title, note=note, width=width, labels=labels, top=top,
        bottom=top + row_height * len(rows),
        ticks=[(at(share), f"{100 * share:.0f}%") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        rows=[{"label": label, "short": label if len(label) <= 20 else label[:19] + "…", "before": before,
               "after": after, "y": top + row_height * (i + 0.5), "from": at(before), "to": at(after)}
              for i, (label, before, after) in enumerate(rows)],
    )
