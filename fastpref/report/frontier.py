"""Reward against the distance from the reference, sqrt(KL): the chart, the fits of `laws`, and the words for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from markupsafe import Markup

from .charts import Line, line_chart
from .laws import Comparison, Estimate, Fit, compare
from .metrics import number

CURVE_POINTS = 80
X_LABEL = "√KL to the reference, √nats"


@dataclass(frozen=True)
class Measured:
    """One evaluation: how far the policy was from its reference, and the reward there."""

    step: float
    kl: float  # nats a response
    reward: float
    error: float | None = None  # standard error of the reward

    @property
    def distance(self) -> float:
        return max(self.kl, 0.0) ** 0.5


def best_of(points: Sequence[Measured]) -> Measured:
    """The one with the largest reward, the earliest of equals."""
    return max(points, key=lambda point: (point.reward, -point.step))


def fitted(points: Sequence[Measured]) -> Comparison | str:
    """Both forms on these points, or why there is no fit."""
    errors = [point.error or 0.0 for point in points]
    try:
        return compare([p.distance for p in points], [p.reward for p in points], errors)
    except ValueError as error:
        return f"No law is fitted: {error}."


def frontier(points: Sequence[Measured], best_place: str) -> Markup:
    """A `<figure>` of rewards from a scorer, with both fits. best_place: where the best checkpoint is, for the note."""
    if len(points) < 2:
        return Markup()
    best, found = best_of(points), fitted(points)
    lines = [_measured("fresh samples, ± standard error", points), _best(best)]
    notes = [best_sentence(points, best_place)]
    if isinstance(found, str):
        notes.append(found)
    else:
        most = max(point.distance for point in points)
        grid = numpy.linspace(0, most, CURVE_POINTS)
        for fit, label in ((found.law, "R₀ + d (a − b log d)"), (found.quadratic, "R₀ + d (a − b d)")):
            lines.append(Line(label, list(zip(grid.tolist(), fit(grid).tolist())), fit.form))
            notes.append(_words(fit, label, most))
        notes.append(found.verdict)
    return line_chart("Reward of fresh samples against √KL", lines, y_label="mean reward",
                      x_label=X_LABEL, x_name="√KL", note=" ".join(notes))


def implicit_frontier(points: Sequence[Measured]) -> Markup:
    """A `<figure>` of the implicit reward margin, where nothing better was measured."""
    if len(points) < 2:
        return Markup()
    best = best_of(points)
    note = (
        "Not a gold reward: no scorer was given, so this is the held-out margin that the loss itself raises, which can "
        "go up while the responses get worse; no law is fitted to it. Highest at step "
        f"{number(best.step, 8)}: {number(best.reward)} at √KL {number(best.distance)} (KL on the data's responses)."
    )
    return line_chart("Implicit reward margin against √KL",
                      [_measured("held-out", points), _best(best)], y_label="chosen − rejected reward, nats",
                      x_label=X_LABEL, x_name="√KL", note=note)


def best_sentence(points: Sequence[Measured], place: str) -> str:
    best, last = best_of(points), max(points, key=lambda point: point.step)
    where = f"at step {number(best.step, 8)}, √KL {number(best.distance)} ({place})"
    words = f"Best held-out reward {_with_error(best)} {where}"
    if best.step == last.step:
        return f"{words}, the last measured."
    return f"{words}; the last, at step {number(last.step, 8)}, was {_with_error(last)} at √KL {number(last.distance)}."


def _measured(label: str, points: Sequence[Measured]) -> Line:
    errors = [point.error or 0.0 for point in points]
    return Line(label, [(p.distance, p.reward) for p in points], "eval", "points", errors)


def _best(best: Measured) -> Line:
    return Line("best", [(best.distance, best.reward)], "best", "points")


def _with_error(point: Measured) -> str:
    return number(point.reward) + (f" ± {number(point.error, 2)}" if point.error else "")


def _words(fit: Fit, label: str, most: float) -> str:
    what = "Law" if fit.form == "law" else "Quadratic"
    peak = "no peak"
    if fit.peak is not None:
        beyond = "" if fit.peak <= most else ", beyond what was measured"
        peak = f"peak at √KL {number(fit.peak)}{beyond}"
    return f"{what} {label}: a = {_interval(fit.a)}, b = {_interval(fit.b)} (95 % intervals); {peak}."


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
