"""Means with standard errors, by metric name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ul2r.model.export_examples import Example


@dataclass(frozen=True)
class Score:
    """A mean over rows or examples.

    Attributes:
        mean: The estimate, in the metric's unit.
        stderr: Standard error of the mean, as from one sample of held-out text of this size to another.
        count: Number of rows or examples averaged.
    """

    mean: float
    stderr: float
    count: int

    @property
    def is_error_known(self) -> bool:
        """False if nothing can be said of the error: there are no two examples, or all have the same value."""
        return self.count > 1 and self.stderr > 0

    def format(self, digits: int) -> str:
        """Return "mean ± standard error" with this number of decimals, "mean ± ?" if the error is not known."""
        error = f"{self.stderr:.{digits}f}" if self.is_error_known else "?"
        return f"{self.mean:.{digits}f} ± {error}"


def average(values: npt.ArrayLike) -> Score:
    """Return the mean of independent values (B,), B >= 2, with its standard error."""
    array = np.asarray(values, np.float64)
    # ddof=1: the mean is estimated from the same values.
    stderr = array.std(ddof=1) / math.sqrt(len(array))
    return Score(float(array.mean()), float(stderr), len(array))


def average_tokens(losses: npt.ArrayLike, mask: npt.ArrayLike) -> Score:
    """Return the mean loss of the masked tokens; the independent samples are rows, not tokens.

    The mean is a ratio of sums over rows, sum(l_r) / sum(n_r). Its standard error is that of the residuals
    l_r - mean * n_r (Cochran, Sampling Techniques, 1977, 6.4), so rows may have different numbers of tokens.

    Args:
        losses: Nats, float (B, S).
        mask: 1 where a token counts, (B, S); B >= 2.
    """
    is_counted = np.asarray(mask, bool)
    # np.where, since losses outside the mask may be NaN, which no multiplication by 0 removes.
    row_losses = np.where(is_counted, np.asarray(losses, np.float64), 0.0).sum(axis=1)  # (B,)
    row_tokens = is_counted.sum(axis=1)  # (B,)
    num_rows = len(row_losses)

    # Long rows weigh more: this is the mean over tokens, not over rows.
    mean = row_losses.sum() / row_tokens.sum()
    squares = np.square(row_losses - mean * row_tokens).sum() * num_rows / (num_rows - 1)
    return Score(float(mean), float(math.sqrt(squares) / row_tokens.sum()), num_rows)


def to_perplexity(loss: Score) -> Score:
    """Return the exponential of a loss in nats; its standard error is of first order."""
    # The slope of exp is exp.
    return Score(math.exp(loss.mean), math.exp(loss.mean) * loss.stderr, loss.count)


@dataclass(frozen=True)
class InfilledText:
    """A held-out span that a model has infilled, as people read it.

    Attributes:
        left: Text before the span.
        target: The span.
        right: Text after it.
        answer: What the model wrote in its place.
        edit_similarity: Of answer and target, between 0 and 1.
    """

    left: str
    target: str
    right: str
    answer: str
    edit_similarity: float


@dataclass(frozen=True)
class Scores:
    """Scores of one run.

    Attributes:
        values: Scores by metric name; `ul2r.evaluation.list_metrics` lists the names.
        infilled: Some of the spans that the scores of infilling come from; empty if they were not kept.
        examples: Texts that the model writes best in; empty if none were chosen.
    """

    values: Mapping[str, Score]
    infilled: tuple[InfilledText, ...] = ()
    examples: tuple[Example, ...] = ()

    def __getitem__(self, metric: str) -> Score:
        return self.values[metric]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain JSON values that `from_dict` reads back."""
        return {metric: asdict(score) for metric, score in self.values.items()}

    @classmethod
    def from_dict(
        cls,
        tree: Mapping[str, Mapping[str, Any]],
        infilled: Iterable[Mapping[str, Any]] = (),
        examples: Iterable[Mapping[str, Any]] = (),
    ) -> Self:
        """Parse the result of `to_dict`, and texts that were written as plain values of their fields."""
        return cls(
            {metric: Score(**fields) for metric, fields in tree.items()},
            tuple(InfilledText(**fields) for fields in infilled),
            tuple(Example(**fields) for fields in examples),
        )
