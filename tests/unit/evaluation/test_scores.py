"""Means and their standard errors."""

import json
import math
import statistics

import numpy as np
import pytest

from ul2r.evaluation.scores import Score, Scores, average, average_tokens, to_perplexity


def test_average_of_values_and_its_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]

    score = average(values)

    assert score.mean == pytest.approx(0.6)
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert score.count == 5


def test_tokens_outside_the_mask_do_not_count() -> None:
    losses = np.array([[1.0, np.inf, 3.0], [5.0, 7.0, np.nan]])
    mask = np.array([[1, 0, 1], [1, 1, 0]])

    assert average_tokens(losses, mask).mean == pytest.approx((1 + 3 + 5 + 7) / 4)


def test_rows_of_equal_length_have_the_mean_and_standard_error_of_their_row_means() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=(9, 4))

    by_row = average(losses.mean(axis=1))
    by_token = average_tokens(losses, np.ones_like(losses))

    assert by_token.mean == pytest.approx(by_row.mean)
    assert by_token.stderr == pytest.approx(by_row.stderr)
    assert by_token.count == 9


def test_rows_of_different_lengths_have_the_standard_error_of_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    losses = rng.gamma(2.0, size=(200, 30)) + rng.normal(size=(200, 1))
    mask = np.arange(30) < rng.integers(5, 31, size=(200, 1))

    means = [
        average_tokens(np.delete(losses, row, 0), np.delete(mask, row, 0)).mean
        for row in range(200)
    ]
    center = statistics.mean(means)
    jackknife = math.sqrt(199 / 200 * sum((mean - center) ** 2 for mean in means))

    assert average_tokens(losses, mask).stderr == pytest.approx(jackknife, rel=0.02)


def test_perplexity_is_the_exponential_with_its_slope_as_standard_error() -> None:
    loss = Score(2.0, 1e-4, 8)

    perplexity = to_perplexity(loss)

    difference = to_perplexity(Score(2.0 + 1e-4, 0.0, 8)).mean - perplexity.mean
    assert perplexity.mean == pytest.approx(math.e**2)
    assert perplexity.stderr == pytest.approx(difference, rel=1e-3)


def test_scores_survive_json() -> None:
    scores = Scores({"infill_loss": Score(1 / 3, 0.1, 7), "causal_loss": Score(2.0, 0.2, 8)})

    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score(2.0, 0.125, 8), "2.000 ± 0.125"),
        (Score(2.0, 1e-6, 8), "2.000 ± 0.000"),
        (Score(0.0, 0.0, 64), "0.000 ± ?"),
        (Score(2.0, 0.0, 1), "2.000 ± ?"),
        (Score(2.0, math.nan, 1), "2.000 ± ?"),
        (Score(math.nan, math.nan, 0), "nan ± ?"),
    ],
)
def test_error_that_cannot_be_estimated_is_no_number(score: Score, text: str) -> None:
    assert score.format(3) == text
