"""Fits of reward against sqrt(KL): planted parameters come back, intervals cover, and what cannot be told is said."""

from __future__ import annotations

import math

import numpy
import pytest

from fastpref.report.laws import FORMS, compare, fit, t_quantile

D = numpy.linspace(0.2, 4.0, 12)


def rewards(form, d, start, a, b):
    """Written out, one by one."""
    return numpy.array([start + x * (a - b * (math.log(x) if form == "law" else x)) if x else start for x in d])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("origin", [True, False])
def test_planted_parameters_come_back(form, origin):
    d = numpy.concatenate(([0.0], D))
    found = fit(form, d, rewards(form, d, 0.7 * origin, 1.3, 0.4), origin=origin)
    assert found.a.value == pytest.approx(1.3, abs=1e-9) and found.b.value == pytest.approx(0.4, abs=1e-9)
    assert (found.origin is None) == (not origin) and (not origin or found.origin.value == pytest.approx(0.7))
    assert found.a.high - found.a.low < 1e-9
    grid = numpy.linspace(0.01, 12, 24001)
    assert found.peak == pytest.approx(grid[found(grid).argmax()], abs=1e-3)
    assert found(0.0) == pytest.approx(0.7 * origin)


@pytest.mark.parametrize("form", FORMS)
def test_intervals_cover_the_truth_as_often_as_they_say(form):
    """1,000 experiments of 10 points whose errors differ by a factor of 8 and are known up to a common scale."""
    rng, d = numpy.random.default_rng(7), numpy.linspace(0.3, 3.0, 10)
    errors = numpy.geomspace(0.4, 0.05, 10)
    truth, hits = rewards(form, d, 0.2, 1.0, 0.3), numpy.zeros(3)
    for _ in range(1000):
        found = fit(form, d, truth + rng.normal(size=10) * errors, 5 * errors)
        for i, (part, value) in enumerate(((found.origin, 0.2), (found.a, 1.0), (found.b, 0.3))):
            hits[i] += part.low <= value <= part.high
    assert (hits > 930).all() and (hits < 970).all()  # 950 +- 7: within three standard deviations


def test_weights_are_the_inverse_variances():
    """Against the normal equations of a design whose rows are divided by their errors."""
    rng = numpy.random.default_rng(1)
    y, errors = rng.normal(size=12), rng.uniform(0.1, 2, size=12)
    design = numpy.array([[1, x, -x * math.log(x)] for x in D]) / errors[:, None]
    values = numpy.linalg.solve(design.T @ design, design.T @ (y / errors))
    variance = ((y / errors - design @ values) ** 2).sum() / 9
    half = 2.262157 * numpy.sqrt(numpy.diag(numpy.linalg.inv(design.T @ design)) * variance)  # t, 9 degrees of freedom
    found = fit("law", D, y, errors)
    for part, value, h in zip((found.origin, found.a, found.b), values, half, strict=True):
        assert (part.value, part.low, part.high) == pytest.approx((value, value - h, value + h), rel=1e-6)
    errors[3] = 0.0  # all scores were equal: that says nothing of the reward's precision
    errors[4] = math.nan
    others = numpy.delete(errors, [3, 4])
    filled = errors.copy()
    filled[[3, 4]] = math.sqrt((others**2).mean())
    assert fit("law", D, y, errors) == fit("law", D, y, filled)


@pytest.mark.parametrize("form", FORMS)
def test_the_right_form_is_named_where_the_data_tell(form):
    d = numpy.linspace(0.05, 6, 40)
    noise = numpy.random.default_rng(3).normal(size=40) * 0.02
    found = compare(d, rewards(form, d, 0.0, 1.0, 0.4) + noise)
    assert found.better == form and f"The {form} fits better" in found.verdict
    k, n = 4, 40  # AICc of a Gaussian: three parameters and the variance
    for one in (found.law, found.quadratic):
        residual = ((rewards(form, d, 0.0, 1.0, 0.4) + noise - one(d)) ** 2).sum()
        assert one.aicc == pytest.approx(n * math.log(residual / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def test_what_the_data_cannot_tell_is_said():
    """Far from the peak both forms are nearly a line. In most of 40 such experiments neither may win."""
    rng, undecided = numpy.random.default_rng(5), 0
    for _ in range(40):
        d = numpy.linspace(0.8, 1.6, 8)
        found = compare(d, rewards("law", d, 0.0, 1.0, 0.3) + rng.normal(size=8) * 0.05)
        undecided += found.better is None
        assert (found.better is None) == (abs(found.law.aicc - found.quadratic.aicc) < 2)
        assert (found.better is None) == ("cannot tell" in found.verdict)
    assert undecided >= 30
    few = compare(D[:5], rewards("law", D[:5], 0.0, 1.0, 0.3))
    assert few.better is None and few.verdict == "5 points cannot tell the law from a quadratic; it takes 6 at least."


@pytest.mark.parametrize(
    ("d", "y", "message"),
    [
        ([0, 1, 2], [0, 1, 2], "3 points at 3 different distances; 3 parameters take at least 4 points at 3"),
        ([1, 1, 1, 2, 2], [0, 1, 2, 3, 4], "5 points at 2 different distances"),
        ([0, 1, 2, -1], [0, 1, 2, 3], "NaN, infinite, or a distance below 0"),
        ([0, 1, 2, 3], [0, 1, math.nan, 3], "NaN, infinite"),
        ([0, 1, 2, 3], [0, 1, 2], "rewards: 3 of them for 4 distances"),
    ],
)
def test_what_cannot_be_fitted_is_refused(d, y, message):
    with pytest.raises(ValueError, match=message):
        fit("law", d, y)


def test_t_quantiles():
    """Tables of Student's t, two-sided 90, 95 and 99 %."""
    table = {1: (6.31375, 12.7062, 63.6567), 2: (2.91999, 4.30265, 9.92484), 5: (2.01505, 2.57058, 4.03214),
             10: (1.81246, 2.22814, 3.16927), 31: (1.69552, 2.03951, 2.74404)}
    for freedom, row in table.items():
        assert [t_quantile(p, freedom) for p in (0.95, 0.975, 0.995)] == pytest.approx(row, rel=2e-5)
