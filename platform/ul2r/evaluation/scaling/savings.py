"""Compute that an arm saves: FLOPs at which its base's curve reaches its score, over what the arm cost in all.

The paper divides 2,500 zFLOPs of PaLM by the 1,075 of a U-PaLM of comparable score (arXiv 2210.11399, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.evaluation.scores import Score

NUM_RESAMPLES = 2_000
LEVELS = (0.025, 0.975)
ROUNDING = 1e-12
"""Relative error of a fit's sums, and more."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """A model's score, and what its training cost.

    Attributes:
        flops: Training FLOPs, those of its base included.
        score: Its score; the error is taken as normal.
    """

    flops: float
    score: Score


@dataclass(frozen=True)
class Savings:
    """FLOPs of the base over those of an arm of equal score.

    A ratio is infinite if the base's curve does not get there, and 0 if it begins above.

    Attributes:
        ratio: The estimate.
        low: Lower end of its 95 % bootstrap interval.
        high: Its upper end.
        floor: Ratio of the curve's first point; a smaller one is only known to be smaller.
        ceiling: Ratio of its last point; a larger one is only known to be larger.
    """

    ratio: float
    low: float
    high: float
    floor: float
    ceiling: float

    @property
    def is_reached(self) -> bool:
        """Return whether the base's curve passes the arm's score."""
        return 0 < self.ratio < math.inf

    @property
    def saves(self) -> bool | None:
        """True if the whole interval is above 1, False if it is below, None if it has both or what is not known."""
        lower = self.ceiling if self.low == math.inf else self.low
        upper = self.floor if self.high == 0 else self.high
        return True if lower > 1 else False if upper < 1 else None

    def describe(self) -> str:
        """Return estimate and interval, such as "2.33x (1.90x to >2.50x)" or "not reached (1.90x to >2.50x)"."""
        words = {math.inf: "not reached", 0.0: "below"}
        ratio = words.get(self.ratio) or f"{self.ratio:.2f}x"
        return f"{ratio} ({self._format(self.low)} to {self._format(self.high)})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in which a ratio without a number is None."""
        return {
            "text": self.describe(),
            "is_reached": self.is_reached,
            **{
                name: value if 0 < value < math.inf else None
                for name, value in (("ratio", self.ratio), ("low", self.low), ("high", self.high))
            },
        }

    def _format(self, ratio: float) -> str:
        if ratio == math.inf:
            return f">{self.ceiling:.2f}x"
        return f"{ratio:.2f}x" if ratio > 0 else f"<{self.floor:.2f}x"


def find_savings(
    base: Sequence[Cost], arm: Cost, *, higher_is_better: bool, seed: int = 0
) -> Savings:
    """Compare an arm with the curve of its base's checkpoints.

    The curve is the best rising fit to the checkpoints (isotonic regression, each weighted by its error), and straight
    between them over the logarithm of FLOPs; it is not prolonged. The interval comes from scores that are drawn from
    their errors (a parametric bootstrap, Efron and Tibshirani 1993, 6.5).

    Args:
        base: Checkpoints of one training, at least two, by rising FLOPs.
        arm: The arm's end.
        higher_is_better: False for losses.
        seed: Seed of the bootstrap.
    """
    sign = 1.0 if higher_is_better else -1.0
    flops = np.array([point.flops for point in base])
    scores = [*(point.score for point in base), arm.score]
    means = sign * np.array([score.mean for score in scores])
    # An unknown error is taken as none.
    errors = np.array([score.stderr if score.is_error_known else 0.0 for score in scores])
    weights = 1 / errors[:-1] ** 2 if np.all(errors[:-1] > 0) else np.ones(len(base))

    generator = np.random.default_rng(seed)
    drawn = means + errors * generator.standard_normal((NUM_RESAMPLES, len(scores)))
    # The estimate is the first row.
    values = np.vstack([means, drawn])
    reached = find_reach(flops, fit_monotone(values[:, :-1], weights), values[:, -1]) / arm.flops
    # A method without interpolation, which would make NaN between infinities.
    low, high = np.quantile(reached[1:], LEVELS, method="inverted_cdf")
    return Savings(
        ratio=float(reached[0]),
        low=float(low),
        high=float(high),
        floor=float(flops[0] / arm.flops),
        ceiling=float(flops[-1] / arm.flops),
    )


def fit_monotone(values: Floats, weights: Floats) -> Floats:
    """Return the rising values nearest to given ones in weighted squares (isotonic regression).

    By the minimax formula (Robertson, Wright and Dykstra 1988, theorem 1.4.4), which suits a handful of points.

    Args:
        values: (R, N), each row by itself.
        weights: (N,), above 0.
    """
    num_points = values.shape[1]
    sums = np.cumsum(np.pad(values * weights, ((0, 0), (1, 0))), axis=1)
    totals = np.cumsum(np.pad(weights, (1, 0)))
    fitted = np.empty_like(values)
    for point in range(num_points):
        lowest = [
            np.min(
                [
                    (sums[:, end] - sums[:, start]) / (totals[end] - totals[start])
                    for end in range(point + 1, num_points + 1)
                ],
                axis=0,
            )
            for start in range(point + 1)
        ]
        fitted[:, point] = np.max(lowest, axis=0)
    return fitted


def find_reach(flops: Floats, fitted: Floats, scores: Floats) -> Floats:
    """Return the fewest FLOPs at which rising curves have reached scores, (R,).

    Args:
        flops: (N,), rising.
        fitted: (R, N), values of the curves there.
        scores: (R,).

    Returns:
        0 where a curve begins at or above its score, infinity where it ends below.
    """
    logs = np.log(flops)
    # A curve that ends at the score has reached it, whatever the rounding of its fit.
    scores = scores - ROUNDING * np.abs(scores)
    reached = np.full(len(scores), math.inf)
    # From the last piece to the first, so that the first one that reaches the score counts.
    for right in range(len(flops) - 1, 0, -1):
        below, above = fitted[:, right - 1], fitted[:, right]
        rise = np.where(above > below, above - below, 1.0)
        share = np.clip((scores - below) / rise, 0, 1)  # others are left out below
        at = np.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))
        reached = np.where((below < scores) & (scores <= above), at, reached)
    return np.where(scores <= fitted[:, 0], 0.0, reached)
