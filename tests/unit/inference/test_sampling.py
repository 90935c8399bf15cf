"""Settings of the sampling, one by one, against plain definitions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from ul2r.errors import RequestError
from ul2r.inference.sampling import SamplingSettings, TokenSampler

IS_TEXT = torch.tensor([False, True, True, True, True])
LOGITS = torch.tensor([9.0, 2.0, 1.0, 0.0, -1.0])


def sample_many(logits: torch.Tensor = LOGITS, **settings: float) -> Counter[int]:
    sampler = TokenSampler(IS_TEXT, SamplingSettings(temperature=1.0, **settings))  # type: ignore[arg-type]  # of all settings
    return Counter(sampler.sample(logits, ()) for _ in range(400))


def test_top_k_leaves_the_most_likely_text_tokens() -> None:
    assert set(sample_many(top_k=2)) == {1, 2}


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    probabilities = torch.softmax(LOGITS[1:], 0)
    assert float(probabilities[0]) < 0.7 < float(probabilities[:2].sum())
    assert set(sample_many(top_p=0.7)) == {1, 2}
    assert set(sample_many(top_p=1e-6)) == {1}


def test_min_p_leaves_tokens_that_are_likely_enough() -> None:
    # exp(-1) = 0.37 and exp(-2) = 0.14 of the most likely one.
    assert set(sample_many(min_p=0.2)) == {1, 2}
    assert set(sample_many(min_p=0.1)) == {1, 2, 3}


def test_a_bias_makes_tokens_likely_but_never_allows_them() -> None:
    settings = SamplingSettings(logit_bias={3: 50.0, 0: 100.0})
    assert TokenSampler(IS_TEXT, settings).sample(LOGITS, ()) == 3


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([0.0, 2.0, 1.9, 1.7, -1.0])
    presence = TokenSampler(IS_TEXT, SamplingSettings(presence_penalty=0.2))
    # Once only: 2.0 - 0.2 < 1.9, 1.9 - 0.2 = 1.7 < 1.8.
    assert [presence.sample(logits, ()) for _ in range(4)] == [1, 2, 1, 1]

    frequency = TokenSampler(IS_TEXT, SamplingSettings(frequency_penalty=0.25))
    assert [frequency.sample(logits, ()) for _ in range(4)] == [1, 2, 1, 3]

    # Tokens of the prompt count: 2.0 / 1.2 = 1.67, 1.9 / 1.2 = 1.58, less than 1.7.
    repetition = TokenSampler(IS_TEXT, SamplingSettings(repetition_penalty=1.2), [1, 2])
    assert repetition.sample(logits, ()) == 3
    negative = torch.tensor([0.0, -1.0, -1.1, -3.0, -3.0])
    assert (
        TokenSampler(IS_TEXT, SamplingSettings(repetition_penalty=1.2), [1]).sample(negative, ())
        == 2
    )


@pytest.mark.parametrize("penalty", [0.01, 100])
def test_the_strongest_penalty_leaves_probabilities(penalty: float) -> None:
    settings = SamplingSettings(temperature=1.0, repetition_penalty=penalty)
    assert TokenSampler(IS_TEXT, settings, range(5)).sample(1e4 * LOGITS, ()) in {1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range: choose 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"min_p": 1.5}, "min_p=1.5 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40 is out of range: choose 0.01"),
        ({"repetition_penalty": 1e308}, "choose 0.01 to 100"),
        ({"presence_penalty": 3}, "choose -2 to 2"),
        ({"logit_bias": {5: 1.0}}, "no token 5: choose 0 to 4"),
        ({"logit_bias": {1: 101.0}}, "choose -100 to 100"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TokenSampler(IS_TEXT, SamplingSettings(**settings))  # type: ignore[arg-type]  # of all settings
