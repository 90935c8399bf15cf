"""Points pooled over seeds, and savings on the curve of their own size."""

from __future__ import annotations

import math

import pytest

from ul2r.evaluation.scaling.points import Axis, ScalingPoint, compute_savings, pool_seeds
from ul2r.evaluation.scaling.tables import tabulate_scores
from ul2r.evaluation.scores import Score

LOSS = Axis("loss", "loss", higher_is_better=False)


def test_error_of_seeds_and_of_text() -> None:
    """Seeds scatter by 0.2 / sqrt(2) / sqrt(2); the text's error stays as it is."""
    pooled = pool_seeds([Score(1.0, 0.05, 64), Score(1.2, 0.05, 64)])

    assert pooled.mean == pytest.approx(1.1)
    assert pooled.stderr == pytest.approx(math.hypot(0.1, 0.05))
    assert pool_seeds([Score(1.0, 0.05, 64)]) == Score(1.0, 0.05, 64)


def test_savings_by_size() -> None:
    """Each size has a curve of its own; one of a single budget has none."""

    def point(size: str, budget: int, arm: str, flops: float, loss: float) -> ScalingPoint:
        return ScalingPoint(size, budget, arm, 1, 1, flops, 1, {"loss": Score(loss, 0.0, 4)})

    points = [
        point("small", 1, "base", 1, 4.0),
        point("small", 2, "base", 4, 3.0),
        point("small", 1, "ul2r", 2, 3.5),
        point("large", 1, "base", 10, 3.0),
        point("large", 2, "base", 40, 2.0),
        point("large", 1, "ul2r", 10, 2.0),
        point("single", 1, "base", 1, 4.0),
        point("single", 1, "ul2r", 2, 3.5),
    ]

    savings = compute_savings(points, LOSS)

    assert set(savings) == {("small", 1, "ul2r"), ("large", 1, "ul2r")}
    assert savings["small", 1, "ul2r"].ratio == pytest.approx(1.0)
    assert savings["large", 1, "ul2r"].ratio == pytest.approx(4.0)


def test_score_of_fewer_seeds_says_so() -> None:
    """As of a ladder whose other seeds are not finished."""
    loss = {"loss": Score(3.0, 0.1, 4)}
    points = [
        ScalingPoint("small", 1, "base", 1, 1, 1.0, 2, loss),
        ScalingPoint("small", 1, "ul2r", 1, 1, 1.0, 1, loss),
    ]
    (row,) = tabulate_scores(points, LOSS).rows
    assert [cell.text for cell in row[2:]] == ["3.000 ± 0.100", "3.000 ± 0.100 (1 seed)"]
