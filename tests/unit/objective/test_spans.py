from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import SpanCorruption
from ul2r.objective.randomness import Purpose, random_words
from ul2r.objective.spans import composition, draw_spans

corruptions = st.builds(
    SpanCorruption,
    name=st.just("X"),
    mean_span=st.floats(1, 64),
    rate=st.floats(0.01, 0.99),
    mode=st.just("NLG"),
    weight=st.just(1),
)


def chi_squared(counts: Counter[tuple[int, ...]], outcomes: Sequence[tuple[int, ...]]) -> float:
    expected = counts.total() / len(outcomes)
    return sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)


@given(st.integers(1, 300), st.data())
def test_parts_are_positive_and_add_up(total: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    words = random_words(data.draw(st.integers(0, 2**32)), Purpose.SPANS, 0, total - 1)
    sizes = composition(total, words, parts)
    assert len(sizes) == parts
    assert sizes.min() >= 1
    assert sizes.sum() == total


def test_every_composition_is_equally_likely() -> None:
    """7 in 3 parts: 15 compositions, 14 degrees of freedom, of which 36.12 is the 99.9 % quantile."""
    outcomes = [sizes for sizes in product(range(1, 8), repeat=3) if sum(sizes) == 7]
    assert len(outcomes) == 15
    counts = Counter(
        tuple(composition(7, random_words(11, Purpose.SPANS, index, 6), 3).tolist())
        for index in range(6000)
    )
    assert set(counts) == set(outcomes)
    assert chi_squared(counts, outcomes) < 36.12


def test_kept_and_masked_runs_are_drawn_independently() -> None:
    """8 kept and 4 masked tokens in 2 runs each: 7 x 3 pairs, 20 degrees of freedom, 99.9 % quantile 45.31."""
    denoiser = SpanCorruption(name="X", mean_span=2, rate=1 / 3, mode="NLG", weight=1)
    outcomes = [(kept, masked) for kept in range(1, 8) for masked in range(1, 4)]
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in range(6000):
        kept, masked = draw_spans(denoiser, 12, random_words(5, Purpose.SPANS, sample, 10))
        assert (kept.sum(), masked.sum()) == (8, 4)
        counts[int(kept[0]), int(masked[0])] += 1
    assert chi_squared(counts, outcomes) < 45.31


@given(corruptions, st.integers(2, 600), st.integers(0, 2**32))
def test_numbers_of_masked_tokens_and_spans_are_the_nominal_ones(
    denoiser: SpanCorruption, raw: int, seed: int
) -> None:
    kept, masked = draw_spans(denoiser, raw, random_words(seed, Purpose.SPANS, 0, raw - 2))
    assert len(kept) == len(masked) == denoiser.spans(raw)
    assert masked.sum() == denoiser.noise_tokens(raw)
    assert kept.sum() + masked.sum() == raw
    assert min(kept.min(), masked.min()) >= 1


def test_spans_of_long_corruption_vary_around_their_mean() -> None:
    """Not all of the mean's length, nor never below it: what NeMo's minimum of 64 made of (64, 0.5)."""
    denoiser = SpanCorruption(name="X", mean_span=64, rate=0.5, mode="NLG", weight=1)
    lengths = [
        length
        for sample in range(200)
        for length in draw_spans(denoiser, 1024, random_words(3, Purpose.SPANS, sample, 1022))[1]
    ]
    assert sum(lengths) / len(lengths) == 64
    assert sum(length < 64 for length in lengths) > len(lengths) / 2
    assert max(lengths) > 128
