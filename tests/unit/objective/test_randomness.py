from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ul2r.objective.randomness import Purpose, below, random_words, uniform

words = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def philox_block(counter: int, key: int) -> list[int]:
    """Philox 4x64-10 written out from the paper (Salmon et al. 2011, section 3.3), on Python's integers."""
    c = [counter >> 64 * place & MASK for place in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [
            second >> 64 ^ c[1] ^ k[0],
            second & MASK,
            first >> 64 ^ c[3] ^ k[1],
            first & MASK,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_reference_gives_the_authors_known_answer() -> None:
    """Random123's `kat_vectors`, "philox4x64 10" with counter and key all zero."""
    assert philox_block(0, 0) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(seed=words, index=words, purpose=st.sampled_from(Purpose))
def test_words_are_philox_of_seed_purpose_and_index(
    seed: int, index: int, purpose: Purpose
) -> None:
    """Pinned to the algorithm, so that a seed means the same run under every version of numpy."""
    key, counter = seed + (purpose << 64), index << 192
    expected = [word for block in (1, 2) for word in philox_block(counter + block, key)]
    assert random_words(seed, purpose, index, 8).tolist() == expected


@given(words, words, st.integers(0, 40), st.integers(0, 40))
def test_fewer_words_are_a_prefix_of_more(seed: int, index: int, few: int, more: int) -> None:
    found = random_words(seed, Purpose.SPANS, index, few + more)
    assert random_words(seed, Purpose.SPANS, index, few).tolist() == found[:few].tolist()


def test_streams_of_other_seeds_purposes_and_indices_differ() -> None:
    streams = {
        tuple(random_words(seed, purpose, index, 4).tolist())
        for seed in range(8)
        for purpose in Purpose
        for index in range(8)
    }
    assert len(streams) == 8 * len(Purpose) * 8


def test_words_neither_use_nor_move_numpys_global_state() -> None:
    """Global state in workers made other pipelines impossible to resume (UL2R.md, traps)."""
    draws = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  the global state is what is tested
        draws.append(random_words(1, Purpose.SPANS, 2, 3).tolist())
        draws.append(np.random.random())  # noqa: NPY002
        np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    untouched = np.random.random()  # noqa: NPY002
    assert draws == [draws[0], untouched] * 2


@given(words)
def test_uniform_is_the_word_as_a_share_of_all_words(word: int) -> None:
    assert 0 <= uniform(word) < 1
    assert (
        Fraction(uniform(word))
        <= Fraction(word, 2**64)
        < Fraction(uniform(word)) + Fraction(1, 2**53)
    )


@given(words, st.integers(1, 2**40))
def test_below_is_the_words_place_among_equal_parts(word: int, bound: int) -> None:
    number = below(word, bound)
    assert 0 <= number < bound
    assert number * 2**64 <= word * bound < (number + 1) * 2**64
