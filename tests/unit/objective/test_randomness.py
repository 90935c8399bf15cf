from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ul2r.objective.random_kernels import fill_words, multiply_high
from ul2r.objective.randomness import Purpose
from ul2r.testing.reference import philox_block

words = st.integers(0, 2**64 - 1)
indices = st.integers(0, 2**63 - 1)


def random_words(seed: int, purpose: Purpose, index: int, num_words: int) -> list[int]:
    """Return the first words of a stream, as the compiled function computes them."""
    out = np.empty(num_words, np.uint64)
    fill_words(np.uint64(seed), np.uint64(purpose), index, out)
    found: list[int] = out.tolist()
    return found


def test_reference_gives_the_authors_known_answer() -> None:
    """Random123's `kat_vectors`, "philox4x64 10" with counter and key all zero."""
    assert philox_block(0, 0) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(seed=words, index=indices, purpose=st.sampled_from(Purpose))
def test_words_are_philox_of_seed_purpose_and_index(
    seed: int, index: int, purpose: Purpose
) -> None:
    """Pinned to the algorithm, so that a seed means the same run under every version of numpy."""
    key = seed + (purpose << 64)
    counter = index << 192
    expected = [word for block in (1, 2) for word in philox_block(counter + block, key)]
    assert random_words(seed, purpose, index, 8) == expected


@given(words, indices, st.integers(0, 40), st.integers(0, 40))
def test_fewer_words_are_a_prefix_of_more(seed: int, index: int, few: int, more: int) -> None:
    found = random_words(seed, Purpose.SPANS, index, few + more)
    assert random_words(seed, Purpose.SPANS, index, few) == found[:few]


def test_streams_of_other_seeds_purposes_and_indices_differ() -> None:
    streams = {
        tuple(random_words(seed, purpose, index, 4))
        for seed in range(8)
        for purpose in Purpose
        for index in range(8)
    }
    assert len(streams) == 8 * len(Purpose) * 8


def test_numpys_global_random_state_is_neither_used_nor_changed() -> None:
    """Global state in workers made other pipelines impossible to resume."""
    draws: list[object] = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  the global state is what is tested
        draws.append(random_words(1, Purpose.SPANS, 2, 3))
        draws.append(np.random.random())  # noqa: NPY002  as above
        np.random.random()  # noqa: NPY002  as above
    np.random.seed(1)  # noqa: NPY002  as above
    untouched = np.random.random()  # noqa: NPY002  as above
    assert draws == [draws[0], untouched] * 2


@given(words, words)
def test_multiply_high_is_the_upper_half_of_the_product(a: int, b: int) -> None:
    assert multiply_high(np.uint64(a), np.uint64(b)) == a * b >> 64


@given(seed=words, index=indices, purpose=st.sampled_from(Purpose))
def test_words_are_those_of_numpys_generator(seed: int, index: int, purpose: Purpose) -> None:
    generator = np.random.Philox(key=seed + (purpose << 64), counter=index << 192)
    assert random_words(seed, purpose, index, 7) == generator.random_raw(7).tolist()
