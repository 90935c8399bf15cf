"""The store and sample that each sample of a blend reads."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ul2r.data.sampling.blend import Blend
from ul2r.data.store.blend import BLOCK, allocate_samples
from ul2r.testing.corpus import counting_windows

weight_lists = st.lists(st.floats(0.01, 5), min_size=1, max_size=6)
seeds = st.integers(0, 2**63 - 1)


def make_blend(weights: list[float], seed: int) -> Blend:
    return Blend([counting_windows(lambda sample: sample) for _ in weights], weights, seed)


@given(weight_lists, seeds, st.integers(0, 10**9))
def test_every_block_has_the_exact_shares(weights: list[float], seed: int, block: int) -> None:
    source, _ = make_blend(weights, seed).locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    assert np.bincount(source, minlength=len(weights)).tolist() == allocate_samples(weights)


@given(weight_lists, seeds, st.integers(0, 10**6))
def test_samples_of_each_store_are_consecutive(weights: list[float], seed: int, block: int) -> None:
    blend = make_blend(weights, seed)
    source, numbers = blend.locate(np.arange(block * BLOCK, (block + 2) * BLOCK))
    for index, count in enumerate(allocate_samples(weights)):
        expected = list(range(block * count, (block + 2) * count))
        assert sorted(numbers[source == index]) == expected


def test_stores_are_shuffled_differently_in_each_block() -> None:
    source, _ = make_blend([1, 1], seed=1).locate(np.arange(3 * BLOCK))
    blocks = source.reshape(3, BLOCK)
    assert len({block.tobytes() for block in blocks}) == 3
    # Runs of fair coin flips: 5,000.5 on average, standard deviation 50.
    assert all(abs((np.diff(block) != 0).sum() - BLOCK / 2) < 300 for block in blocks)


@given(seeds, st.integers(0, 10**6), st.integers(1, 40))
def test_sample_reads_its_own_text_from_its_store(seed: int, first: int, count: int) -> None:
    # The two stores have disjoint tokens, and their samples different steps.
    stores = [
        counting_windows(lambda sample: 3 * sample % 2**20),
        counting_windows(lambda sample: 2**21 + sample % 2**20),
    ]
    blend = Blend(stores, [2, 1], seed)
    samples = np.arange(first, first + count)
    samples[count // 2] = -1
    lengths = np.where(samples < 0, 0, 3)
    text = np.full((count, 3), -1, np.int32)
    blend.read(samples, lengths, text)

    sources, numbers = blend.locate(samples)
    for line, sample, source, number in zip(text, samples, sources, numbers, strict=True):
        if sample >= 0:
            begin = [3 * number % 2**20, 2**21 + number % 2**20][source]
            assert line.tolist() == [begin, begin + 1, begin + 2]
