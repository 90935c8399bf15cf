"""The amount of training at which one way of reading overtakes another, extrapolated from checkpoints of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.evaluation.paired import INTERVAL, NUM_RESAMPLES


@dataclass(frozen=True)
class Crossing:
    """Tokens at which a mean difference is zero.

    Attributes:
        tokens: Where the line through all items' means is zero; infinity if it does not come there. If it is below zero
            from the first checkpoint on, or at the last one and rising, the tokens of the first.
        low: Lower end of the 95 % bootstrap interval over items.
        high: Its upper end; infinity if more than 2.5 % of the resampled lines do not come to zero.
    """

    tokens: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain JSON values, infinity as None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def extrapolate_crossing(
    tokens: Sequence[float], differences: npt.ArrayLike, seed: int = 0
) -> Crossing:
    """Return where a falling mean difference reaches zero, by a straight line over the logarithm of tokens.

    The interval says how far another sample of items would move the line, and not whether the line is straight: it is
    an estimate for the next run, the less to be trusted the further it lies behind the last checkpoint.

    Args:
        tokens: Tokens of T >= 2 different checkpoints, above 0.
        differences: Differences of N >= 2 items at each of them, float (T, N).
        seed: Seed of the resampling.

    Raises:
        ValueError: If a difference is not a number.
    """
    positions = np.log(np.asarray(tokens, np.float64))
    values = np.asarray(differences, np.float64)  # (T, N)
    if not np.isfinite(values).all():
        raise ValueError("differences: not all are finite numbers")
    num_items = values.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        num_items, np.full(num_items, 1 / num_items), size=NUM_RESAMPLES
    )
    (center,) = _find_zeros(positions, values.mean(axis=1, keepdims=True))
    # Of inverted order statistics, since two infinities have no mean.
    low, high = np.percentile(
        _find_zeros(positions, values @ draws.T / num_items), INTERVAL, method="inverted_cdf"
    )
    return Crossing(float(center), float(low), float(high))


def _find_zeros(positions: npt.NDArray[Any], means: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the tokens at which least-squares lines through means (T, K) are zero, (K,)."""
    slopes, intercepts = np.polyfit(positions, means, deg=1)
    is_falling = slopes < 0
    is_reached = slopes * positions.max() + intercepts <= 0
    first = np.exp(positions.min())
    zeros = np.where(is_reached, first, np.inf)
    with np.errstate(over="ignore"):
        zeros[is_falling] = np.exp(-intercepts[is_falling] / slopes[is_falling])
    zeros[zeros < first] = first
    return zeros
