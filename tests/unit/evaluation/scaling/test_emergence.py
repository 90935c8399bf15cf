"""The smallest run above chance."""

from __future__ import annotations

from collections.abc import Mapping

from ul2r.evaluation.scaling.emergence import find_emergence, is_above_chance
from ul2r.evaluation.scaling.points import Axis, ScalingPoint
from ul2r.evaluation.scores import Score

TASK = Axis("copa", "COPA", higher_is_better=True, chance=0.5)


def points_of(means: Mapping[tuple[str, int], float], stderr: float = 0.05) -> list[ScalingPoint]:
    return [
        ScalingPoint(size, budget, "ul2r", 10, 1, budget, 2, {"copa": Score(mean, stderr, 100)})
        for (size, budget), mean in means.items()
    ]


def test_one_sided_95_percent() -> None:
    # The quantile 0.95 of the normal distribution is 1.6449.
    assert is_above_chance(Score(0.5 + 1.65 * 0.05, 0.05, 100), TASK)
    assert not is_above_chance(Score(0.5 + 1.64 * 0.05, 0.05, 100), TASK)
    assert not is_above_chance(Score(0.9, 0.0, 1), TASK)  # of one item nothing can be said
    # All right: by chance in 1 of 16 cases of four items, in 1 of 32 of five.
    assert not is_above_chance(Score(1.0, 0.0, 4), TASK)
    assert is_above_chance(Score(1.0, 0.0, 5), TASK)
    assert not is_above_chance(Score(0.0, 0.0, 5), TASK)
    loss = Axis("loss", "loss", higher_is_better=False, chance=2.0)
    assert is_above_chance(Score(1.0, 0.1, 9), loss)
    assert not is_above_chance(Score(3.0, 0.1, 9), loss)


def test_smallest_that_stays_above() -> None:
    """An accident of a short training, whose longer one is at chance, does not count."""
    points = points_of(
        {("small", 1): 0.7, ("small", 4): 0.5, ("large", 2): 0.5, ("large", 8): 0.65}
    )

    found = find_emergence(points, TASK)

    assert found is not None
    assert (found.size, found.budget) == ("large", 8)


def test_none_above_chance() -> None:
    assert find_emergence(points_of({("small", 1): 0.5, ("large", 2): 0.55}), TASK) is None
    unknown = Axis("copa", "COPA", higher_is_better=True)
    assert find_emergence(points_of({("small", 1): 0.9}), unknown) is None
