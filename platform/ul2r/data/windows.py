"""Which text a sample reads: a sample index becomes a window of the token store, without a table.

The tokens are cut into windows of equal length. In each epoch every window is read once, in a new order and with
the cuts moved by a new random shift, so that an epoch sees other windows and other ends left over.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError
from ul2r.objective.kernels import Word, compiled, fill_words, high_product
from ul2r.objective.randomness import Purpose

ROUNDS = 8
"""Feistel rounds; four already pass for random where the round function is (Luby and Rackoff 1988)."""


class Tokens(Protocol):
    """A run of tokens that goes round: after the last comes the first."""

    def __len__(self) -> int: ...

    def tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + length), of shape (length,)."""


class Windows:
    """Windows of `length` tokens by sample index; memory and time do not grow with the store.

    Sample k is window `k % n` of epoch `k // n`, where n = tokens // length. An epoch reads n windows that do not
    overlap; the tokens % length tokens between the last cut and the first are left out of it.
    """

    def __init__(self, store: Tokens, length: int, seed: int, *, split: str = "train") -> None:
        """Cut `store` into windows of `length` tokens.

        Args:
            store: The tokens.
            length: Tokens of a window.
            seed: The run's seed.
            split: Name of the store in the error's text.

        Raises:
            CorpusError: If the store is shorter than one window.
        """
        if len(store) < length:
            raise CorpusError(
                f"the {split} split holds {len(store)} tokens, one window needs {length}: "
                "give more text, shorten objective.sequence_length or raise objective.slots_per_row"
            )
        self.length = length
        self._store, self._seed = store, seed

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self._store) // self.length

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Read the first `lengths[i]` tokens of each sample's window to `windows[i]`; nothing for sample -1."""
        assert lengths.max(initial=0) <= self.length, (lengths.max(), self.length)
        starts = self.starts(samples).tolist()
        for window, start, length in zip(windows, starts, lengths.tolist(), strict=True):
            window[:length] = self._store.tokens(start, length)

    def starts(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of the token that each sample's window begins with, int64 (N,)."""
        starts = np.empty(len(samples), np.int64)
        _fill_starts(
            (np.uint64(self._seed), np.uint64(Purpose.ORDER)),
            samples,
            len(self._store),
            self.length,
            starts,
        )
        return starts


@compiled
def _fill_starts(
    stream: tuple[Word, Word],
    samples: npt.NDArray[np.int64],
    total: int,
    length: int,
    starts: npt.NDArray[np.int64],
) -> None:
    """Write where each sample's window starts: shift of its epoch + permuted place x length, over `total` tokens."""
    seed, purpose = stream
    count = total // length
    words = np.empty(1 + ROUNDS, np.uint64)
    for number in range(len(samples)):
        sample = max(samples[number], 0)
        fill_words(seed, purpose, sample // count, words)
        shift = np.int64(high_product(words[0], np.uint64(total)))
        place = permute(np.uint64(sample % count), np.uint64(count), words[1:])
        starts[number] = (shift + np.int64(place) * length) % total


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
