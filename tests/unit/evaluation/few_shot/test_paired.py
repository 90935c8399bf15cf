"""Paired differences: by hand, against the normal distribution, and for what cannot be paired."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ul2r.errors import RecipeError
from ul2r.evaluation.few_shot.items import HeadlineItems, pool_headlines
from ul2r.evaluation.few_shot.paired import compare_items


def items(values: list[float], prompt: str = "p") -> HeadlineItems:
    return HeadlineItems(
        np.arange(len(values)),
        np.asarray(values),
        tuple((f"{prompt}{index}",) for index in range(len(values))),
    )


def row(
    item: int, value: float, *, seed: int = 1, task: str = "a", headline: bool = True
) -> dict[str, Any]:
    return {
        "line": "line",
        "task": task,
        "seed": seed,
        "item": item,
        "prompt_hash": f"{task}{item}{seed}",
        "value": value,
        "is_headline": headline,
    }


def test_difference_and_error_are_those_of_the_paired_items() -> None:
    found = compare_items({"a": items([0, 0, 1, 1])}, {"a": items([1, 0, 1, 1])})["a"]
    # Differences 1, 0, 0, 0: mean 1/4, standard deviation 1/2, over the root of 4.
    assert found.difference.mean == 0.25
    assert found.difference.stderr == pytest.approx(0.25)
    # Of two arms that move together the unpaired error would be several times as large.
    assert found.difference.count == 4


def test_interval_is_that_of_a_normal_distribution_for_many_items() -> None:
    generator = np.random.default_rng(3)
    base = generator.normal(size=4_000)
    other = base + generator.normal(0.1, 0.5, size=4_000)
    found = compare_items({"a": items(list(base))}, {"a": items(list(other))})["a"]
    mean, stderr = found.difference.mean, found.difference.stderr
    assert found.low == pytest.approx(mean - 1.96 * stderr, abs=0.1 * stderr)
    assert found.high == pytest.approx(mean + 1.96 * stderr, abs=0.1 * stderr)


def test_mean_gives_each_task_the_same_weight() -> None:
    first = {"a": items([0.0] * 10), "b": items([0.0] * 2), "c": items([1.0, 1.0])}
    second = {"a": items([1.0] * 10), "b": items([0.0, 0.0])}
    found = compare_items(first, second)
    assert list(found) == ["a", "b", "mean"]
    assert found["mean"].difference.mean == 0.5
    assert (found["mean"].low, found["mean"].high) == (0.5, 0.5)


def test_same_seed_gives_the_same_interval() -> None:
    drawn = np.random.default_rng(1).normal(size=(2, 9))
    arms = {"a": items(list(drawn[0]))}, {"a": items(list(drawn[1]))}
    assert compare_items(*arms, seed=4) == compare_items(*arms, seed=4)
    assert compare_items(*arms, seed=4) != compare_items(*arms, seed=5)


def test_other_items_or_examples_are_refused() -> None:
    with pytest.raises(RecipeError, match="task a: the two arms were run on other items"):
        compare_items({"a": items([0, 1])}, {"a": items([0, 1], prompt="q")})


def test_seeds_are_pooled_by_item_and_tasks_of_a_line_joined() -> None:
    rows = [
        row(1, 1.0, seed=1),
        row(0, 0.0, seed=1),
        row(0, 1.0, seed=2),
        row(1, 1.0, seed=2),
        row(0, 0.25, task="b"),
        row(0, 9.0, headline=False),
    ]
    pooled = pool_headlines(rows)["line"]
    assert pooled.values.tolist() == [0.5, 1.0, 0.25]
    assert pooled.prompts[0] == ("a01", "a02")
