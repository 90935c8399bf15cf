"""Emergence of a task: the smallest model whose score is above chance."""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.evaluation.scaling.points import Axis, ScalingPoint
from ul2r.evaluation.scores import Score

SIGNIFICANCE = 0.05
ONE_SIDED_95 = 1.6449
"""Standard errors above chance that a normal score exceeds by accident in 5 % of cases."""


def is_above_chance(score: Score, axis: Axis) -> bool:
    """Return whether a score is better than chance at 95 %, one-sided.

    If all items have one value their error is not known: only that all of them are right can then be told from chance,
    whose probability for n items is chance^n.
    """
    if axis.chance is None:
        return False
    if not score.is_error_known:
        is_all_right = axis.higher_is_better and score.mean == 1
        return is_all_right and axis.chance**score.count < SIGNIFICANCE
    gain = (score.mean - axis.chance) * (1 if axis.higher_is_better else -1)
    return gain > ONE_SIDED_95 * score.stderr


def find_emergence(points: Sequence[ScalingPoint], axis: Axis) -> ScalingPoint | None:
    """Return the point of the fewest FLOPs that is above chance, as are all longer trainings of its size and arm.

    Of points that are at chance, one in twenty seems above it by accident; the longer trainings then are not.
    """
    for point in sorted(points, key=lambda point: point.flops):
        later = [
            other
            for other in points
            if (other.size, other.arm) == (point.size, point.arm) and other.flops >= point.flops
        ]
        if all(is_above_chance(other.scores[axis.name], axis) for other in later):
            return point
    return None
