"""Random access to a shuffled order: where sample k stands in it is computed by a keyed permutation, not looked up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.objective.kernels import Word, compiled, fill_words, high_product
from ul2r.objective.randomness import Purpose

Int64s = npt.NDArray[np.int64]

ROUNDS = 8
"""Feistel rounds; four already pass for random where the round function is (Luby and Rackoff 1988)."""
SOURCE_BITS = 48
"""Epochs take this many bits of a stream's index; what stands above is the number of the source."""


def index_shuffle(
    seed: int, purpose: Purpose, samples: Int64s, count: int, *, bound: int = 1, source: int = 0
) -> tuple[Int64s, Int64s]:
    """Places of samples in orders of `count`, a new one for each epoch of `count` samples.

    Args:
        seed: The run's seed.
        purpose: What the order is for.
        samples: Sample indices, int64 (N,); -1 gets what sample 0 gets.
        count: Places in an order.
        bound: What an epoch's shift is below.
        source: Orders of other sources are others.

    Returns:
        The shift of each sample's epoch, and its place in that epoch's order, int64 (N,) each.
    """
    shifts, places = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
    stream = np.uint64(seed), np.uint64(purpose), source << SOURCE_BITS
    _fill_places(stream, samples, count, bound, (shifts, places))
    return shifts, places


@compiled
def _fill_places(
    stream: tuple[Word, Word, int],
    samples: Int64s,
    count: int,
    bound: int,
    out: tuple[Int64s, Int64s],
) -> None:
    """What `index_shuffle` returns."""
    (seed, purpose, first), (shifts, places) = stream, out
    words = np.empty(1 + ROUNDS, np.uint64)
    for number in range(len(samples)):
        sample = max(samples[number], 0)
        fill_words(seed, purpose, first + sample // count, words)
        shifts[number] = high_product(words[0], np.uint64(bound))
        places[number] = permute(np.uint64(sample % count), np.uint64(count), words[1:])


@compiled
def permute(place: Word, size: Word, keys: npt.NDArray[np.uint64]) -> Word:
    """Where a keyed permutation of 0 .. size - 1 puts `place`.

    A Feistel network permutes the numbers of 2 * half bits, at most 4 * size of them; a number that lands outside
    is sent through again until it lands inside ("cycle walking", Black and Rogaway 2002), which takes fewer than
    4 passes on average.

    Args:
        place: What to permute, 0 <= place < size.
        size: Size of the permuted set.
        keys: One word for each round, uint64 (ROUNDS,).
    """
    one = np.uint64(1)
    half = one
    while size > one << np.uint64(2) * half:
        half += one
    mask = (one << half) - one
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) >> (np.uint64(64) - half))
        place = left << half | right
        if place < size:
            return place


@compiled
def mix(word: Word) -> Word:
    """Scatter a uint64's bits (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return word ^ word >> np.uint64(31)
