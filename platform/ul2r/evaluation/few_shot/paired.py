"""Paired differences of two arms on the same items, with standard errors and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ul2r.errors import RecipeError
from ul2r.evaluation.few_shot.items import HeadlineItems
from ul2r.evaluation.paired import INTERVAL, NUM_RESAMPLES, PairedDifference
from ul2r.evaluation.scores import Score

RESAMPLED_AT_ONCE = 2**22
"""Values that are drawn at a time: 32 MiB of indices."""
MEAN = "mean"


def compare_items(
    first: Mapping[str, HeadlineItems], second: Mapping[str, HeadlineItems], seed: int = 0
) -> dict[str, PairedDifference]:
    """Return the difference second minus first of each task that both arms have, and of their mean.

    Items are resampled with replacement within each task (Efron and Tibshirani 1993, 13.3, percentile interval); the
    mean gives each task the same weight.

    Raises:
        RecipeError: If a task has other items or contexts in one of them.
    """
    names = [name for name in first if name in second]
    differences: dict[str, PairedDifference] = {}
    resampled = np.zeros(NUM_RESAMPLES)
    generator = np.random.default_rng(seed)
    for name in names:
        _check_same_items(name, first[name], second[name])
        deltas = second[name].values - first[name].values
        means = _resample_means(deltas, generator)
        resampled += means / len(names)
        low, high = np.percentile(means, INTERVAL)
        differences[name] = PairedDifference(score_values(deltas), float(low), float(high))

    if names:
        scores = [difference.difference for difference in differences.values()]
        low, high = np.percentile(resampled, INTERVAL)
        differences[MEAN] = PairedDifference(average_scores(scores), float(low), float(high))
    return differences


def score_values(values: npt.NDArray[np.float64]) -> Score:
    """Return the mean of items with its standard error, which is 0 and so not known for a single item."""
    if len(values) < 2:
        return Score(float(values.mean()), 0.0, len(values))
    return Score(
        float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values)
    )


def average_scores(scores: list[Score]) -> Score:
    """Return the unweighted mean of independent scores; the count is that of the scores."""
    stderr = float(np.sqrt(sum(score.stderr**2 for score in scores)) / len(scores))
    return Score(float(np.mean([score.mean for score in scores])), stderr, len(scores))


def _check_same_items(name: str, first: HeadlineItems, second: HeadlineItems) -> None:
    if first.prompts != second.prompts:
        raise RecipeError(
            f"task {name}: the two arms were run on other items, few-shot examples or seeds ({len(first.items)} and "
            f"{len(second.items)} items): run both with the same evaluation.few_shot and evaluation.data"
        )


def _resample_means(
    values: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return the means of `NUM_RESAMPLES` resamples of items."""
    count = len(values)
    at_once = max(1, RESAMPLED_AT_ONCE // count)
    means = [
        values[generator.integers(count, size=(min(at_once, NUM_RESAMPLES - start), count))].mean(1)
        for start in range(0, NUM_RESAMPLES, at_once)
    ]
    return np.concatenate(means)
