"""Extrapolation of a curve to the tokens at which it crosses zero, against lines whose crossing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ul2r.evaluation.crossing import Crossing, extrapolate_crossing

TOKENS = [1e6, 2e6, 4e6, 8e6]


def test_a_straight_line_is_followed_to_its_zero() -> None:
    # Half a nat less with each doubling, 1.0 at 1 million: zero after two doublings.
    mean = np.array([1.0, 0.5, 0.0, -0.5])
    crossing = extrapolate_crossing(TOKENS, np.tile(mean[:, None], 20))

    assert crossing.tokens == pytest.approx(4e6)
    assert crossing.low == pytest.approx(4e6)
    assert crossing.high == pytest.approx(4e6)


def test_the_interval_holds_the_true_crossing_in_most_samples() -> None:
    generator = np.random.default_rng(3)
    mean = np.array([2.0, 1.75, 1.5, 1.25])  # zero at 1e6 * 2**8
    held = 0
    for seed in range(100):
        # Items differ from each other, each of them the same way at all checkpoints, and by chance at each.
        items = generator.normal(0, 0.3, 64) + generator.normal(0, 0.3, (4, 64))
        crossing = extrapolate_crossing(TOKENS, mean[:, None] + items, seed)
        held += crossing.low <= 256e6 <= crossing.high
        assert crossing.low <= crossing.tokens <= crossing.high
    assert 85 <= held <= 100


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_a_line_that_does_not_fall_never_crosses(rise: float) -> None:
    mean = np.array([1.0, 1.0 + rise, 1.0 + 2 * rise, 1.0 + 3 * rise])
    crossing = extrapolate_crossing(TOKENS, np.tile(mean[:, None], 20))

    assert crossing == Crossing(math.inf, math.inf, math.inf)
    assert crossing.to_dict() == {"tokens": None, "low": None, "high": None}


def test_a_line_that_may_rise_has_no_upper_end() -> None:
    items = np.random.default_rng(0).normal(0, 1, (4, 32))
    mean = np.array([1.0, 0.97, 0.94, 0.91])
    crossing = extrapolate_crossing(TOKENS, mean[:, None] + items)

    assert crossing.high == math.inf
    assert crossing.low < math.inf


@pytest.mark.parametrize("mean", [(-1.0, -0.9, -0.8, -0.7), (-0.5, -0.6, -0.7, -0.8)])
def test_what_is_ahead_from_the_first_checkpoint_on_has_crossed_there(
    mean: tuple[float, ...],
) -> None:
    crossing = extrapolate_crossing(TOKENS, np.tile(np.array(mean)[:, None], 20))
    assert (crossing.tokens, crossing.low, crossing.high) == pytest.approx((1e6, 1e6, 1e6))


def test_differences_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not all are finite"):
        extrapolate_crossing(TOKENS, np.full((4, 3), math.nan))
