"""Points of a ladder: scores of a size, budget and arm, pooled over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ul2r.evaluation.scaling.savings import Cost, Savings, find_savings
from ul2r.evaluation.scores import Score

BASE = "base"


@dataclass(frozen=True)
class Axis:
    """A score of the figure.

    Attributes:
        name: Its key in a point's scores.
        label: For people, with its unit.
        higher_is_better: False for losses.
        digits: Decimals shown.
        chance: Its level without any knowledge, None if that is not known.
    """

    name: str
    label: str
    higher_is_better: bool
    digits: int = 3
    chance: float | None = None


@dataclass(frozen=True)
class ScalingPoint:
    """One size, budget and arm.

    Attributes:
        size: Name of the size.
        budget: Steps of the base.
        arm: Name of the arm.
        num_parameters: Parameters of the model.
        tokens: Tokens of training, the base's included.
        flops: FLOPs of training, the base's included; the mean over seeds.
        num_seeds: Number of runs.
        scores: Scores by name.
    """

    size: str
    budget: int
    arm: str
    num_parameters: int
    tokens: int
    flops: float
    num_seeds: int
    scores: Mapping[str, Score]

    def cost(self, name: str) -> Cost:
        """Return a score with what it cost."""
        return Cost(self.flops, self.scores[name])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def pool_seeds(scores: Sequence[Score]) -> Score:
    """Return the mean over seeds.

    Its error has two parts: the seeds' own scatter, and the error by the held-out text or the items, which is the same
    for all seeds and is not averaged out.
    """
    means = np.array([score.mean for score in scores])
    within = float(np.mean([score.stderr for score in scores]))
    between = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0
    return Score(float(means.mean()), math.hypot(within, between), scores[0].count)


def select(points: Sequence[ScalingPoint], size: str, arm: str) -> list[ScalingPoint]:
    """Return the points of a size and arm by rising FLOPs."""
    chosen = [point for point in points if (point.size, point.arm) == (size, arm)]
    return sorted(chosen, key=lambda point: point.flops)


def list_sizes(points: Sequence[ScalingPoint]) -> list[str]:
    """Return the sizes from the smallest on."""
    parameters = {point.size: point.num_parameters for point in points}
    return sorted(parameters, key=parameters.__getitem__)


def list_arms(points: Sequence[ScalingPoint]) -> list[str]:
    """Return the arms that continue the base, in order of appearance."""
    return [arm for arm in dict.fromkeys(point.arm for point in points) if arm != BASE]


def compute_savings(
    points: Sequence[ScalingPoint], axis: Axis
) -> dict[tuple[str, int, str], Savings]:
    """Return what each continued point saves on the curve of its own size, by size, budget and arm.

    Sizes with fewer than two budgets have no curve, and are left out.
    """
    found = {}
    for size in list_sizes(points):
        base = [point.cost(axis.name) for point in select(points, size, BASE)]
        if len(base) < 2:
            continue
        for arm in list_arms(points):
            for point in select(points, size, arm):
                found[size, point.budget, arm] = find_savings(
                    base, point.cost(axis.name), higher_is_better=axis.higher_is_better
                )
    return found
