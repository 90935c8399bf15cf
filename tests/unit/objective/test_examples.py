from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import Causal, Denoiser, Prefix, SpanCorruption
from ul2r.objective import Vocabulary
from ul2r.objective.examples import Example, make_example

TEXT = 1000
"""Raw tokens are TEXT, TEXT + 1, ...; special ones lie below."""

VOCABULARY = Vocabulary(
    size=10_000,
    eos=7,
    modes={"S2S": 1, "NLU": 2, "NLG": 3},
    sentinels=tuple(range(900, 500, -1)),
)
corruptions = st.builds(
    SpanCorruption,
    name=st.just("R"),
    mean_span=st.floats(1, 64),
    rate=st.floats(0.01, 0.99),
    mode=st.sampled_from(["NLU", "NLG"]),
    weight=st.just(1),
)
lengths, seeds, samples = st.integers(4, 400), st.integers(0, 2**63 - 1), st.integers(0, 2**40)


def example_of(denoiser: Denoiser, length: int, seed: int = 1, sample: int = 0) -> Example:
    window = np.arange(TEXT, TEXT + length, dtype=np.int32)
    example = make_example(denoiser, window, vocabulary=VOCABULARY, seed=seed, sample=sample)
    assert example.tokens.dtype == np.int32
    assert len(example.tokens) == denoiser.example_length(length)
    return example


def runs(tokens: list[int]) -> tuple[list[list[int]], list[int]]:
    """Runs of text between sentinels, and the sentinels."""
    texts: list[list[int]] = [[]]
    sentinels = []
    for token in tokens:
        if token in VOCABULARY.sentinels:
            sentinels.append(token)
            texts.append([])
        else:
            texts[-1].append(token)
    return texts, sentinels


@given(corruptions, lengths, seeds, samples)
def test_span_corruption_gives_the_whole_window_back(
    denoiser: SpanCorruption, length: int, seed: int, sample: int
) -> None:
    """A decoder that knows only the format: what is cut from the targets, or out of place, is missed."""
    example = example_of(denoiser, length, seed, sample)
    mode, *inputs = example.tokens[: example.inputs].tolist()
    *targets, end = example.tokens[example.inputs :].tolist()
    assert mode == VOCABULARY.modes[denoiser.mode]
    assert end == VOCABULARY.eos
    kept, input_sentinels = runs(inputs)
    masked, target_sentinels = runs(targets)
    assert input_sentinels == target_sentinels == list(VOCABULARY.sentinels[: len(kept) - 1])
    assert kept.pop() == [], "inputs end in a sentinel: the last token is masked"
    assert masked.pop(0) == [], "targets begin with a sentinel"
    assert all(kept), "a token is kept before each span, the first token always"
    assert all(masked)
    raw = [token for pair in zip(kept, masked, strict=True) for run in pair for token in run]
    assert raw == list(range(TEXT, TEXT + length))


@given(lengths, seeds, samples)
def test_prefix_gives_the_whole_window_back(length: int, seed: int, sample: int) -> None:
    example = example_of(Prefix(weight=1), length, seed, sample)
    text = list(range(TEXT, TEXT + length))
    assert example.tokens.tolist() == [VOCABULARY.modes["S2S"], *text, VOCABULARY.eos]
    assert 2 <= example.inputs <= length, "at least one token to read and one to predict"


def test_causal_is_the_window_itself() -> None:
    example = example_of(Causal(), 30)
    assert example.tokens.tolist() == list(range(TEXT, TEXT + 30))
    assert example.inputs == 0


def test_prefix_lengths_are_uniform() -> None:
    """Uniform on 1 .. 9 and read, not predicted: NeMo's S read 75 % where 25 % was meant.

    9 outcomes, 8 degrees of freedom, 99.9 % quantile 26.12.
    """
    draws = 4500
    counts = Counter(example_of(Prefix(weight=1), 10, 3, k).inputs - 1 for k in range(draws))
    assert set(counts) == set(range(1, 10))
    assert sum((count - draws / 9) ** 2 / (draws / 9) for count in counts.values()) < 26.12


@pytest.mark.parametrize(
    "denoiser",
    [
        SpanCorruption(name="R", mean_span=3, rate=0.3, mode="NLU", weight=1),
        Prefix(weight=1),
    ],
)
def test_other_seeds_and_samples_fall_elsewhere(denoiser: Denoiser) -> None:
    tokens = {
        (*example.tokens.tolist(), example.inputs)
        for seed in range(5)
        for sample in range(5)
        for example in [example_of(denoiser, 300, seed, sample)]
    }
    assert len(tokens) >= 24, "25 draws, of which a prefix's may coincide"


def test_more_spans_than_sentinels_are_an_error_of_ours() -> None:
    """Never an ordinary subword, the last sentinel again, or one modulo their number (UL2R.md, traps)."""
    few = Vocabulary(size=10_000, eos=7, modes=VOCABULARY.modes, sentinels=(4, 5, 6))
    window = np.arange(TEXT, TEXT + 40, dtype=np.int32)
    dense = SpanCorruption(name="X", mean_span=3, rate=0.5, mode="NLG", weight=1)
    with pytest.raises(AssertionError, match="more spans than sentinels"):
        make_example(dense, window, vocabulary=few, seed=1, sample=0)
