"""Savings, on the paper's own numbers and on curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ul2r.evaluation.scaling.savings import (
    Cost,
    Savings,
    find_reach,
    find_savings,
    fit_monotone,
)
from ul2r.evaluation.scores import Score

ZETTA = 1e21
# 540B at 182, 329 and 780 B tokens (arXiv 2210.11399, appendix; FLOPs by 6ND), and 2.5 zFLOPs of UL2R.
PALM = ((590, 62.7), (1067, 63.8), (2527, 66.5))
U_PALM = ((592.5, 64.1), (1069.5, 66.2), (2529.5, 69.4))


def cost(zettaflops: float, mean: float, stderr: float = 0.0) -> Cost:
    return Cost(zettaflops * ZETTA, Score(mean, stderr, 26))


def test_paper_headline() -> None:
    """Equal scores at 2,500 and 1,075 zFLOPs are 2.33x, which the paper prints as 2.35x."""
    savings = find_savings(
        [cost(590, 62.7), cost(2500, 66.0)], cost(1075, 66.0), higher_is_better=True
    )

    assert savings.ratio == pytest.approx(2500 / 1075)
    assert f"{savings.ratio:.2f}" == "2.33"
    assert (savings.low, savings.high) == (savings.ratio, savings.ratio)  # no errors are known


def test_paper_540b() -> None:
    """Between two checkpoints the curve is straight in log FLOPs, and beyond the last it says nothing."""
    base = [cost(*point) for point in PALM]
    first, second, third = (
        find_savings(base, cost(*point), higher_is_better=True) for point in U_PALM
    )

    # 64.1 lies a ninth of the way from 63.8 to 66.5, and 66.2 eight ninths.
    assert first.ratio == pytest.approx(1067 ** (8 / 9) * 2527 ** (1 / 9) / 592.5)
    assert second.ratio == pytest.approx(1067 ** (1 / 9) * 2527 ** (8 / 9) / 1069.5)
    assert not third.is_reached
    assert third.describe() == "not reached (>1.00x to >1.00x)"


def test_losses_fall() -> None:
    base = [cost(1, 4.0), cost(4, 3.0), cost(16, 2.0)]

    assert find_savings(base, cost(2, 2.5), higher_is_better=False).ratio == pytest.approx(4.0)
    worse = find_savings(base, cost(2, 4.5), higher_is_better=False)
    assert worse.ratio == 0.0
    assert worse.describe() == "below (<0.50x to <0.50x)"


def test_fit_pools_points_that_fall() -> None:
    """Neighbors in the wrong order get their weighted mean (worked by hand)."""
    values = np.array([[1.0, 3.0, 2.0, 5.0, 4.0, 3.0]])
    weights = np.array([1.0, 1.0, 3.0, 1.0, 1.0, 1.0])

    fitted = fit_monotone(values, weights)

    np.testing.assert_allclose(fitted, [[1.0, 2.25, 2.25, 4.0, 4.0, 4.0]])


def test_fit_is_the_nearest_rising_curve() -> None:
    """No rising curve on a fine grid is nearer in weighted squares."""
    generator = np.random.default_rng(3)
    values, weights = generator.normal(size=(1, 3)), generator.uniform(0.5, 2, size=3)
    grid = np.linspace(-3, 3, 61)
    first, second, third = np.meshgrid(grid, grid, grid, indexing="ij")
    curves = np.stack([first, second, third], axis=-1)[(first <= second) & (second <= third)]

    fitted = fit_monotone(values, weights)[0]

    distances = ((curves - values) ** 2 * weights).sum(axis=-1)
    assert ((fitted - values[0]) ** 2 * weights).sum() <= distances.min()
    assert np.all(np.diff(fitted) >= 0)


def test_reach_takes_the_first_of_a_flat_part() -> None:
    flops = np.array([1.0, 10.0, 100.0, 1000.0])
    fitted = np.array([[0.0, 1.0, 1.0, 2.0]])

    reached = [find_reach(flops, fitted, np.array([score]))[0] for score in (0.0, 0.5, 1.0, 1.5, 3)]

    assert reached == pytest.approx([0.0, 10**0.5, 10.0, 10**2.5, math.inf])


def test_interval_follows_the_errors() -> None:
    """Of a curve of slope 1 in log2 FLOPs, an error of s in the arm's score is a factor of 2**(1.96 s)."""
    base = [cost(2**power, power) for power in range(8)]

    savings = find_savings(base, cost(1, 4.0, stderr=0.5), higher_is_better=True)

    assert savings.ratio == pytest.approx(16)
    assert math.log2(savings.low / 16) == pytest.approx(-0.98, abs=0.06)
    assert math.log2(savings.high / 16) == pytest.approx(0.98, abs=0.06)


def test_interval_that_is_open() -> None:
    base = [cost(1, 0.0), cost(2, 1.0)]

    savings = find_savings(base, cost(1, 0.9, stderr=0.3), higher_is_better=True)

    assert savings.is_reached
    assert savings.high == math.inf
    assert savings.describe().endswith(" to >2.00x)")
    assert savings.to_dict()["high"] is None


@pytest.mark.parametrize(
    ("low", "high", "floor", "ceiling", "saves"),
    [
        (1.1, 3.0, 0.2, 4.0, True),
        (0.9, 3.0, 0.2, 4.0, None),
        (0.3, 0.9, 0.2, 4.0, False),
        (math.inf, math.inf, 0.2, 4.0, True),
        # The arm cost more than the base's last checkpoint: what the curve would cost there is not known.
        (math.inf, math.inf, 0.2, 0.9, None),
        (0.0, 0.0, 0.2, 0.9, False),
        (0.0, 0.0, 1.2, 4.0, None),
    ],
)
def test_whether_compute_is_saved(
    low: float, high: float, floor: float, ceiling: float, saves: bool | None
) -> None:
    assert Savings(1.0, low, high, floor, ceiling).saves is saves
