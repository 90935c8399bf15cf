"""Differences of two models on the same items: mean, standard error and bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.evaluation.scores import Score, average_tokens

NUM_RESAMPLES = 2_000
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means: a 95 % interval (Efron and Tibshirani 1993, 13.3)."""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two arms on a task, or in the mean over tasks.

    Attributes:
        difference: Second arm minus first, with its standard error, by items.
        low: Lower end of the 95 % bootstrap interval.
        high: Its upper end.
    """

    difference: Score
    low: float
    high: float


def compare_tokens(
    measured: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_]]],
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Return the mean difference, second minus first, of each of several metrics of the same items.

    The mean is over tokens, its error and interval over the items that hold them (`average_tokens`). All metrics are
    resampled by the same draws of items.

    Args:
        measured: Values of the first and of the second model, and the mask of those that count, by metric: float, float
            and bool of shape (B, ...), B being the same items in all of them.
        seed: Seed of the resampling.
    """
    if not measured:
        return {}
    differences = {name: _flatten(second - first) for name, (first, second, _) in measured.items()}
    masks = {name: _flatten(mask) for name, (_, _, mask) in measured.items()}
    sums = np.stack([np.where(masks[n], differences[n], 0.0).sum(1) for n in measured], axis=1)
    counts = np.stack([masks[n].sum(1) for n in measured], axis=1)  # (B, metrics)

    # How often each item is drawn: (resamples, B).
    num_items = len(counts)
    shares = np.full(num_items, 1 / num_items)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(num_items, shares, size=NUM_RESAMPLES).astype(np.float64)
    drawn_counts = draws @ counts
    # A metric of few items has draws without any.
    means = np.divide(
        draws @ sums, drawn_counts, out=np.full(drawn_counts.shape, np.nan), where=drawn_counts > 0
    )
    low, high = np.nanpercentile(means, INTERVAL, axis=0)
    return {
        name: PairedDifference(
            average_tokens(differences[name], masks[name]), float(low[number]), float(high[number])
        )
        for number, name in enumerate(measured)
    }


def _flatten(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of each item in one row."""
    return values.reshape(len(values), -1)
