"""Fits of reward against the distance from the reference, d = sqrt(KL). numpy only; nothing here knows a run.

    law          R(d) = R_0 + d (a - b log d)    Gao et al., arXiv 2210.10760, for RL; arXiv 2406.02900 for DPO and IPO
    quadratic    R(d) = R_0 + d (a - b d)        Gao et al.'s form for best-of-n: the rival that a law has to beat

Both rise, peak and fall where a, b > 0, and both are linear in (R_0, a, b), so a fit is weighted least squares with
Student's t intervals, no search. Gao et al. count rewards from that of the reference, R_0 = 0; measured rewards are
not, so R_0 is fitted too unless `origin` fixes it at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[numpy.float64]
CLEAR = 2.0  # difference of AICc from which one form counts as better (Burnham and Anderson, 2002, section 2.6)


def _law(d: Array) -> Array:
    return -d * numpy.log(numpy.where(d > 0, d, 1.0))  # 0 log 0 = 0


def _quadratic(d: Array) -> Array:
    return -(d**2)


FORMS: dict[str, Callable[[Array], Array]] = {"law": _law, "quadratic": _quadratic}


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float  # of the confidence interval
    high: float


@dataclass(frozen=True)
class Fit:
    """One form, fitted."""

    form: str  # a key of FORMS
    origin: Estimate | None  # R_0; None: fixed at 0
    a: Estimate
    b: Estimate
    points: int
    residual: float  # weighted sum of squares; weights have mean 1
    aicc: float  # up to a constant that both forms share

    def __call__(self, d: ArrayLike) -> Array:
        """R at these distances."""
        at = numpy.asarray(d, dtype=numpy.float64)
        start = self.origin.value if self.origin else 0.0
        return start + self.a.value * at + self.b.value * FORMS[self.form](at)

    @property
    def peak(self) -> float | None:
        """The distance with the largest reward; None where the fitted curve has no peak above 0."""
        a, b = self.a.value, self.b.value
        if b <= 0:
            return None
        if self.form == "law":  # R' = a - b log d - b
            return math.exp(min(a / b - 1, 700.0))
        return a / (2 * b) if a > 0 else None


@dataclass(frozen=True)
class Comparison:
    """Both forms on the same points, and what may be said of them."""

    law: Fit
    quadratic: Fit
    better: str | None  # "law" or "quadratic"; None: the data cannot tell
    verdict: str  # the sentence that says so


def fit(form: str, d: ArrayLike, rewards: ArrayLike, errors: ArrayLike | None = None, *, origin: bool = True,
        confidence: float = 0.95) -> Fit:
    """Weighted least squares of one form.

    d [n], at least 0; rewards [n]; errors [n]: standard errors of the rewards, whose inverse squares are the weights
    (one that is 0 or no number says nothing and takes the root mean square of the others; None: equal weights). Their
    common scale is estimated from the residuals, n - p degrees of freedom, so that a form that fits badly gets wide
    intervals. Errors of d are not in it.

    Raises ValueError for fewer than p + 1 points or p different distances above 0 (with `origin`: p in all), where
    p = 3 parameters, or 2 without `origin`.
    """
    at, y = (numpy.asarray(x, dtype=numpy.float64).reshape(-1) for x in (d, rewards))
    if at.shape != y.shape:
        raise ValueError(f"rewards: {len(y)} of them for {len(at)} distances")
    if not (numpy.isfinite(at).all() and numpy.isfinite(y).all() and (at >= 0).all()):
        raise ValueError("d, rewards: a value is NaN, infinite, or a distance below 0")
    parameters = 2 + origin
    different = len(numpy.unique(at if origin else at[at > 0]))
    if len(at) < parameters + 1 or different < parameters:
        raise ValueError(f"{len(at)} points at {different} different distances; {parameters} parameters take at least "
                         f"{parameters + 1} points at {parameters}")
    weights = _weights(errors, len(at))
    columns = [numpy.ones_like(at)] * origin + [at, FORMS[form](at)]
    root = numpy.sqrt(weights)[:, None]
    design, target = numpy.stack(columns, axis=1) * root, y * root[:, 0]
    scale = numpy.linalg.norm(design, axis=0)  # columns of one length: d in nats may be 0.01 or 100
    values = numpy.linalg.lstsq(design / scale, target, rcond=None)[0] / scale
    freedom = len(at) - parameters
    residual = float(((target - design @ values) ** 2).sum())
    inverse = numpy.linalg.pinv((design / scale).T @ (design / scale)) / numpy.outer(scale, scale)
    half = t_quantile(0.5 + confidence / 2, freedom) * numpy.sqrt(numpy.diag(inverse) * residual / freedom)
    *first, a, b = (Estimate(v, v - h, v + h) for v, h in zip(values.tolist(), half.tolist()))
    return Fit(form, first[0] if first else None, a, b, len(at), residual, _aicc(residual, y, weights, parameters + 1))


def compare(d: ArrayLike, rewards: ArrayLike, errors: ArrayLike | None = None, *, origin: bool = True,
            confidence: float = 0.95) -> Comparison:
    """Both forms, and which of them the data prefer: the one whose AICc is lower by at least 2; else neither. AICc
    needs p + 3 points; with fewer, neither. Arguments and errors as `fit`."""
    law, quadratic = (fit(form, d, rewards, errors, origin=origin, confidence=confidence) for form in FORMS)
    least = 5 + origin
    if law.points < least:
        return Comparison(law, quadratic, None, f"{law.points} points cannot tell the law from a quadratic; it takes "
                                                f"{least} at least.")
    difference = law.aicc - quadratic.aicc
    if abs(difference) < CLEAR:
        return Comparison(law, quadratic, None, "The data cannot tell the law from a quadratic: their AICc differ by "
                                                f"{abs(difference):.1f}, and {CLEAR:g} is the least that says "
                                                "something.")
    better, other = ("law", "quadratic") if difference < 0 else ("quadratic", "law")
    return Comparison(law, quadratic, better, f"The {better} fits better than the {other}: its AICc is lower by "
                                              f"{abs(difference):.1f}.")


def _weights(errors: ArrayLike | None, n: int) -> Array:
    """Mean 1, so that residuals keep the rewards' unit."""
    if errors is None:
        return numpy.ones(n)
    variances = numpy.asarray(errors, dtype=numpy.float64).reshape(-1) ** 2
    if len(variances) != n:
        raise ValueError(f"errors: {len(variances)} of them for {n} distances")
    known = numpy.isfinite(variances) & (variances > 0)
    if not known.any():
        return numpy.ones(n)
    weights = 1 / numpy.where(known, variances, variances[known].mean())
    return weights / weights.mean()  # type: ignore[no-any-return]


def _aicc(residual: float, y: Array, weights: Array, k: int) -> float:
    """n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1), k counting the error's variance; NaN where n < k + 2."""
    n = len(y)
    if n < k + 2:
        return math.nan
    floor = n * (1e-13 * (float(numpy.abs(y).max()) + 1e-30)) ** 2  # an exact fit: below this it is rounding
    return n * math.log(max(residual, floor) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t, for 0.5 <= probability < 1: bisection of its distribution function."""
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ValueError(f"probability, freedom: got {probability}, {freedom}; expected 0.5 to below 1, at least 1")
    low, high = 0.0, 1.0
    while _t_between(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_between(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _t_between(t: float, freedom: int) -> float:
    """P(-t < T < t): Abramowitz and Stegun 26.7.3 (odd degrees of freedom) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(freedom))
    cos, odd = math.cos(angle), freedom % 2
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos**2 * (i - 1) / i
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
