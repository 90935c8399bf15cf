"""Means with their standard errors, by metric name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Score:
    """A mean over rows or examples.

    Attributes:
        mean: The estimate, in the metric's unit.
        stderr: Its standard error: how far another sample of held-out text as large would move it.
        count: Rows or examples that it is taken over.
    """

    mean: float
    stderr: float
    count: int


def mean_score(values: npt.ArrayLike) -> Score:
    """Mean of independent values (B,), B >= 2, and the standard error of that mean."""
    array = np.asarray(values, np.float64)
    return Score(float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))), len(array))


def token_score(losses: npt.ArrayLike, mask: npt.ArrayLike) -> Score:
    """Mean loss of the masked tokens; rows, not tokens, are the independent draws.

    The mean is a ratio of sums over rows, sum(l_r) / sum(n_r), whose standard error is that of the residuals
    l_r - mean * n_r (Cochran, Sampling Techniques, 1977, 6.4), so rows may have different numbers of tokens.

    Args:
        losses: Nats, float (B, S).
        mask: 1 where a token counts, (B, S); B >= 2.
    """
    counted = np.asarray(mask, bool)
    totals = np.where(counted, np.asarray(losses, np.float64), 0.0).sum(axis=1)  # (B,)
    tokens = counted.sum(axis=1)
    mean = totals.sum() / tokens.sum()
    spread = np.square(totals - mean * tokens).sum() * len(totals) / (len(totals) - 1)
    return Score(float(mean), float(math.sqrt(spread) / tokens.sum()), len(totals))


def perplexity(loss: Score) -> Score:
    """The exponential of a loss in nats; its error to first order."""
    return Score(math.exp(loss.mean), math.exp(loss.mean) * loss.stderr, loss.count)


@dataclass(frozen=True)
class Scores:
    """What was measured of one run.

    Attributes:
        values: Scores by metric name; the names are listed in `ul2r.evaluation.metrics`.
    """

    values: Mapping[str, Score]

    def __getitem__(self, metric: str) -> Score:
        return self.values[metric]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values that `from_dict` reads back."""
        return {metric: asdict(score) for metric, score in self.values.items()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Mapping[str, Any]]) -> Self:
        """Read what `to_dict` wrote."""
        return cls({metric: Score(**fields) for metric, fields in tree.items()})
