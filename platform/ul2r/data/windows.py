"""Which text a sample reads: a sample index becomes a window of the token store, without a table.

The tokens are cut into windows of equal length. In each epoch every window is read once, in a new order and with
the cuts moved by a new random shift, so that an epoch sees other windows and other ends left over.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError
from ul2r.objective.randomness import Purpose, below, random_words

ROUNDS = 8
"""Feistel rounds; four already pass for random where the round function is (Luby and Rackoff 1988)."""

WORD = 2**64 - 1


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

    def window(self, sample: int, length: int) -> npt.NDArray[np.int32]:
        """The first `length` tokens of a sample's window, of shape (length,)."""
        assert length <= self.length, (length, self.length)
        return self._store.tokens(self.start(sample), length)

    def start(self, sample: int) -> int:
        """Number of the token that a sample's window begins with."""
        epoch, place = divmod(sample, len(self))
        shift_word, *keys = _epoch_words(self._seed, epoch)
        shift = below(shift_word, len(self._store))
        return (shift + permute(place, len(self), keys) * self.length) % len(self._store)


def permute(place: int, size: int, keys: list[int]) -> int:
    """Where a keyed permutation of 0 .. size - 1 puts `place`.

    A Feistel network permutes the numbers of 2 * half bits, at most 4 * size of them; a number that lands outside
    is sent through again until it lands inside ("cycle walking", Black and Rogaway 2002), which takes fewer than
    4 passes on average.

    Args:
        place: What to permute, 0 <= place < size.
        size: Size of the permuted set.
        keys: One 64-bit key for each round.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = place >> half, place & (1 << half) - 1
        for key in keys:
            left, right = right, left ^ _mix(right ^ key) >> 64 - half
        place = left << half | right
        if place < size:
            return place


def _mix(word: int) -> int:
    """Scatter a 64-bit word's bits (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


@lru_cache(maxsize=8)
def _epoch_words(seed: int, epoch: int) -> list[int]:
    """An epoch's shift and round keys, kept for the few epochs that a batch may touch."""
    words: list[int] = random_words(seed, Purpose.ORDER, epoch, 1 + ROUNDS).tolist()
    return words
