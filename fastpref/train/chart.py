"""Line and before/after charts as inline SVG for the run report. Knows how to draw, not what a run is.

Colours, fonts and dashes are CSS classes (`report.py` has the style sheet), so one picture serves light, dark and
print; drawn by hand, a chart is a few kB of text and needs no plotting library. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

Point = tuple[float, float]
T = TypeVar("T")

# One unit is about one CSS pixel where the report is read, so that text has the same size in both formats.
SIZES = {"large": (520, 270), "small": (260, 175)}
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 44  # room for the tick labels; the legend is HTML and wraps by itself
MOST_POINTS = 300  # more than this cannot be told apart on a plot 444 units wide, and the file stays small
MOST_MARKERS = 60
MARKED = ("marked", "points")


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


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, a real minus sign; n/a for None, NaN and inf."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            text = f"{mantissa}e{int(exponent)}"
    if text == "-0":
        return "0"
    return "−" + text[1:] if text[0] == "-" else text


def percent(value: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "n/a" if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


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


def _marker(role: str, x: float, y: float, title: str) -> str:
    tip = f"<title>{escape(title)}</title>"
    if role == "best":
        return f'<path class="ring" d="M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0">{tip}</path>'
    if role == "rejected":
        return f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4">{tip}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>'


def _swatch(line: Line) -> str:
    mark = _marker(line.role, 15, 6, "").replace("<title></title>", "") if line.kind in MARKED else ""
    path = "" if line.kind == "points" else '<path d="M1 6H29"/>'
    return (
        f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">'
        f'<g class="{line.role} {line.kind}">{path}{mark}</g></svg>'
    )


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
) -> str:
    """A `<figure>`: heading, legend, axes, lines, and `note` below. `shares`: values in [0, 1], drawn as 0-100%.

    `guide` is a horizontal line (value, label), e.g. chance; `size` "large" or "small"; `x_name` is what a marker's
    tip calls x.
    Lines without points are left out; without any line, "" returns.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = (-0.03, 1.03) if shares else _y_range(
        lines, [0.0] * from_zero + ([guide[0]] if guide else [])
    )
    width, height = SIZES[size]
    right, bottom = width - RIGHT, height - BOTTOM

    def at_x(x: float) -> float:
        return LEFT + 6 + (x - x_low) / (x_high - x_low) * (right - LEFT - 12)

    def at_y(y: float) -> float:  # a spike beyond the range runs along the frame
        return bottom - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (bottom - TOP)

    show = (lambda v: f"{100 * v:.0f}%") if shares else (lambda v: number(v, 4))
    parts = []
    few = 5 if size == "large" else 4
    for y in (0.0, 0.25, 0.5, 0.75, 1.0) if shares else ticks(y_low, y_high, few):
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{show(y)}</text>')
    x_ticks = [x for x in ticks(x_low, x_high, few) if x == round(x) or x_high - x_low < 5]
    for x in x_ticks:
        parts.append(f'<path class="axis" d="M{at_x(x):.1f} {bottom}v4"/>')
        label = number(x, 8)
        parts.append(f'<text class="tick" x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="label" x="{LEFT}" y="14">{escape(y_label)}</text>')
    parts.append(
        f'<text class="label" x="{right}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>'
    )
    if guide:
        y = at_y(guide[0])
        parts.append(f'<path class="guide" d="M{LEFT} {y:.1f}H{right}"/>')
        y += -5 if y > (TOP + bottom) / 2 else 14  # on the side that has more room
        parts.append(
            f'<text class="guide-label" x="{right}" y="{y:.1f}" text-anchor="end">{escape(guide[1])}</text>'
        )
    for line in sorted(lines, key=lambda line: ("trace", "pale", "line", *MARKED).index(line.kind)):
        points = spread(line.points, 4 * MOST_MARKERS) if line.kind in MARKED else thin(line.points)
        path = "".join(
            f"{'L' if i else 'M'}{at_x(x):.1f} {at_y(y):.1f}" for i, (x, y) in enumerate(points)
        )
        if len(points) == 1 and line.kind not in MARKED:
            path += "h0.01"  # with round caps a single value is a dot
        path = "" if line.kind == "points" else f'<path d="{path}"/>'
        parts.append(f'<g class="{line.role} {line.kind}">{path}')
        if line.kind in MARKED:
            errors = line.errors or [0.0] * len(line.points)
            for (x, y), e in spread(list(zip(line.points, errors)), MOST_MARKERS):
                value = percent(y) if shares else number(y, 4)
                if e:
                    parts.append(f'<path class="error" d="M{at_x(x):.1f} {at_y(y - e):.1f}V{at_y(y + e):.1f}"/>')
                at = number(x, 8 if x == round(x) else 4)
                parts.append(_marker(line.role, at_x(x), at_y(y), f"{line.label}, {x_name} {at}: {value}"))
        parts.append("</g>")

    labelled = [line for line in lines if line.kind != "trace"]
    legend = "".join(f"<li>{_swatch(line)}{escape(line.label)}</li>" for line in labelled)
    legend = f'<ul class="legend">{legend}</ul>' if size == "large" else ""  # small ones hold one line
    described = escape(f"{title}. {y_label} over {x_label}. {note}", quote=True)
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>{legend}'
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{described}">'
        f"{''.join(parts)}</svg><figcaption>{escape(note)}</figcaption></figure>"
    )


def change_chart(title: str, rows: Sequence[tuple[str, float, float]], *, note: str = "") -> str:
    """A `<figure>` of shares in [0, 1], one line per (label, before, after): a hollow dot and a full one."""
    if not rows:
        return ""
    label_width, row_height, top = 150, 26, 12
    bottom = top + row_height * len(rows)
    width, _ = SIZES["large"]
    span = width - label_width - 40

    def at(value: float) -> float:
        return label_width + 8 + min(max(value, 0.0), 1.0) * span

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{at(share):.1f} {top - 6}V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at(share):.1f}" y="{bottom + 18}" text-anchor="middle">{100 * share:.0f}%</text>'
        )
    for i, (label, before, after) in enumerate(rows):
        y = top + row_height * (i + 0.5)
        short = label if len(label) <= 20 else label[:19] + "…"
        tip = escape(f"{label}: {percent(before)} before, {percent(after)} after")
        parts.append(
            f'<g class="change"><title>{tip}</title>'
            f'<text class="row-label" x="{label_width - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short)}</text>'
            f'<path d="M{at(before):.1f} {y:.1f}H{at(after):.1f}"/>'
            f'<circle class="before" cx="{at(before):.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<circle class="after" cx="{at(after):.1f}" cy="{y:.1f}" r="5.5"/></g>'
        )
    legend = "".join(
        '<li><svg class="swatch" viewBox="0 0 30 12" aria-hidden="true"><g class="change">'
        f'<circle class="{name}" cx="15" cy="6" r="4.5"/></g></svg>{name}</li>'
        for name in ("before", "after")
    )
    described = escape(title + ". " + "; ".join(f"{n}: {percent(b)} to {percent(a)}" for n, b, a in rows), quote=True)
    return (
        f'<figure class="card"><h3>{escape(title)}</h3><ul class="legend">{legend}</ul>'
        f'<svg class="chart" viewBox="0 0 {width} {bottom + 26}" role="img" aria-label="{described}">'
        f"{''.join(parts)}</svg><figcaption>{escape(note)}</figcaption></figure>"
    )
