from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ul2r.objective.random_kernels import random_segmentation
from ul2r.objective.randomness import Purpose
from ul2r.testing.reference import random_words


def composition(total: int, parts: int, seed: int, index: int, first: int = 0) -> list[int]:
    """Divide `total` into `parts` by the words of a stream from `first` on."""
    words = random_words(seed, Purpose.SPANS, index, first + parts - 1)[first:]
    is_taken = np.zeros(total, np.bool_)
    sizes = np.empty(parts, np.int32)
    random_segmentation(total, np.array(words, np.uint64), is_taken, sizes)
    assert not is_taken.any(), "the scratch is left all False"
    found: list[int] = sizes.tolist()
    return found


def chi_squared(counts: Counter[tuple[int, ...]], outcomes: Sequence[tuple[int, ...]]) -> float:
    expected = counts.total() / len(outcomes)
    return sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)


@given(st.integers(1, 300), st.integers(0, 2**32), st.data())
def test_parts_are_positive_and_add_up(total: int, seed: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    sizes = composition(total, parts, seed, 0)
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert sum(sizes) == total


def test_every_composition_is_equally_likely() -> None:
    """7 in 3 parts: 15 compositions; 36.12 is the 99.9 % quantile for 14 degrees of freedom."""
    outcomes = [sizes for sizes in product(range(1, 8), repeat=3) if sum(sizes) == 7]
    assert len(outcomes) == 15
    counts = Counter(tuple(composition(7, 3, 11, index)) for index in range(6000))
    assert set(counts) == set(outcomes)
    assert chi_squared(counts, outcomes) < 36.12


def test_every_composition_into_many_parts_is_equally_likely() -> None:
    """7 in 5 parts: 4 of 6 gaps, so most of them are chosen. 14 degrees of freedom, 36.12 again."""
    outcomes = [sizes for sizes in product(range(1, 4), repeat=5) if sum(sizes) == 7]
    assert len(outcomes) == 15
    counts = Counter(tuple(composition(7, 5, 3, index)) for index in range(6000))
    assert chi_squared(counts, outcomes) < 36.12


def test_kept_and_masked_runs_are_drawn_independently() -> None:
    """8 kept and 4 masked tokens in 2 runs each: 7 x 3 pairs, 20 degrees of freedom, 99.9 % quantile 45.31."""
    outcomes = [(kept, masked) for kept in range(1, 8) for masked in range(1, 4)]
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in range(6000):
        kept = composition(8, 2, 5, sample)
        masked = composition(4, 2, 5, sample, first=1)
        counts[kept[0], masked[0]] += 1
    assert chi_squared(counts, outcomes) < 45.31


def test_spans_of_long_corruption_vary_around_their_mean() -> None:
    """Neither all of the mean length nor all above it, which was the effect of NeMo's minimum of 64 on (64, 0.5)."""
    lengths = [length for sample in range(200) for length in composition(512, 8, 3, sample)]
    assert sum(lengths) / len(lengths) == 64
    assert sum(length < 64 for length in lengths) > len(lengths) / 2
    assert max(lengths) > 128
