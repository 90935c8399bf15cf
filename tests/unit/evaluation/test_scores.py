"""Means and their standard errors."""

import json
import math
import statistics

import numpy as np
import pytest

from ul2r.evaluation.scores import Score, Scores, average, average_tokens, to_perplexity


def test_mean_of_values_and_its_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    score = average(values)
    assert score.mean == pytest.approx(0.6)
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert score.count == 5


def test_tokens_outside_the_mask_do_not_count() -> None:
    losses = np.array([[1.0, np.inf, 3.0], [5.0, 7.0, np.nan]])
    mask = np.array([[1, 0, 1], [1, 1, 0]])
    assert average_tokens(losses, mask).mean == pytest.approx((1 + 3 + 5 + 7) / 4)


def test_rows_of_equal_size_give_the_mean_and_error_of_their_own_means() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=(9, 4))
    by_rows = average(losses.mean(axis=1))
    by_tokens = average_tokens(losses, np.ones_like(losses))
    assert by_tokens.mean == pytest.approx(by_rows.mean)
    assert by_tokens.stderr == pytest.approx(by_rows.stderr)
    assert by_tokens.count == 9


def test_rows_of_different_sizes_have_the_error_that_the_jackknife_finds() -> None:
    generator = np.random.default_rng(1)
    losses = generator.gamma(2.0, size=(200, 30)) + generator.normal(size=(200, 1))
    mask = np.arange(30) < generator.integers(5, 31, size=(200, 1))
    without = [
        average_tokens(np.delete(losses, row, 0), np.delete(mask, row, 0)).mean for row in range(200)
    ]
    jackknife = math.sqrt(199 / 200 * sum((m - statistics.mean(without)) ** 2 for m in without))
    assert average_tokens(losses, mask).stderr == pytest.approx(jackknife, rel=0.02)


def test_perplexity_is_the_exponential_with_the_slope_as_error() -> None:
    loss = Score(2.0, 1e-4, 8)
    above = to_perplexity(Score(2.0 + 1e-4, 0.0, 8)).mean - to_perplexity(loss).mean
    assert to_perplexity(loss).mean == pytest.approx(math.e**2)
    assert to_perplexity(loss).stderr == pytest.approx(above, rel=1e-3)


def test_scores_survive_json() -> None:
    scores = Scores({"infill_loss": Score(1 / 3, 0.1, 7), "causal_loss": Score(2.0, 0.2, 8)})
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
