"""The held-out split by tokens: how many tokens at the end of each document are kept out of training.

A corpus of many documents is split by whole ones: those with the smallest keys, which is as good as random, does not
depend on anything else, and puts equal documents on one side. A document that would be a large part of the split is cut
instead, and contributes its end in proportion to its length: so a corpus of two books is not split into one to train on
and one to measure on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError

Keys = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

MIN_WHOLE_DOCUMENTS = 4
"""A document is cut if fewer of its length would be the whole split."""
MIN_PART_TOKENS = 2
"""Tokens of either part of a document that is cut: one of text, and the eos that ends the part."""
SPLIT_DTYPE = np.dtype([("key", "<u8"), ("tokens", "<i8")])
ALL_TOKENS = 2**62
"""More than any document has: it is held out as a whole."""


@dataclass(frozen=True, eq=False)
class HeldOutSplit:
    """Documents that are held out, as a whole or in part.

    Attributes:
        keys: Their keys, uint64 (K,), ascending.
        tokens: Tokens at the end of each that are held out, int64 (K,).
    """

    keys: Keys
    tokens: Int64s

    def count(self, keys: Keys, sizes: Int64s) -> Int64s:
        """Return how many tokens at the end of documents are held out, int64 (N,).

        Args:
            keys: Keys of the documents, uint64 (N,).
            sizes: Their tokens, int64 (N,).
        """
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        is_held_out = self.keys[places] == keys
        return np.where(is_held_out, np.minimum(self.tokens[places], sizes), 0)

    def save(self, path: Path) -> None:
        """Write the split, for segments that are made later."""
        table = np.empty(len(self.keys), SPLIT_DTYPE)
        table["key"] = self.keys
        table["tokens"] = self.tokens
        np.save(path, table)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, or the keys alone that older versions wrote, which held out whole documents."""
        table = np.load(path)
        if table.dtype == np.uint64:
            return cls(table, np.full(len(table), ALL_TOKENS, np.int64))
        return cls(table["key"], table["tokens"])


def choose_held_out(keys: Keys, sizes: Int64s, fraction: float, max_tokens: int) -> HeldOutSplit:
    """Choose the tokens to hold out: `fraction` of all, but no more than `max_tokens`.

    Args:
        keys: Key of each document, uint64 (D,); copies of a document have the same.
        sizes: Tokens of each, the eos included, int64 (D,).
        fraction: Fraction of the tokens.
        max_tokens: Most tokens.

    Raises:
        CorpusError: If there is no text, or too little to be divided.
    """
    if not len(keys):
        raise CorpusError(
            "the corpus has no text, all its files are empty: set data.corpus to your text"
        )
    total = int(sizes.sum())
    budget = min(fraction * total, max_tokens)
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    size = sizes[first]
    # With their copies, which are on one side. Floats add integers below 2**53 exactly.
    with_copies = np.bincount(inverse, weights=sizes)

    is_cut = with_copies * MIN_WHOLE_DOCUMENTS > budget
    tails = np.floor(size * (budget / total)).astype(np.int64)
    tails[np.minimum(tails, size - tails) < MIN_PART_TOKENS] = 0

    # Keys are in ascending order: those whose documents fit into the share of the uncut ones.
    running = np.cumsum(np.where(is_cut, 0.0, with_copies))
    is_whole = ~is_cut & (running <= running[-1] * (budget / total))
    held_out = np.where(is_cut, tails, np.where(is_whole, size, 0))
    if not held_out.any():
        held_out = _hold_out_least(size)

    chosen = held_out > 0
    return HeldOutSplit(unique[chosen], held_out[chosen])


def _hold_out_least(size: Int64s) -> Int64s:
    """Return the smallest split of a corpus of which `fraction` is less than `MIN_PART_TOKENS`."""
    held_out = np.zeros(len(size), np.int64)
    longest = int(size.argmax())
    if size[longest] >= 2 * MIN_PART_TOKENS:
        held_out[longest] = MIN_PART_TOKENS
    elif len(size) > 1:
        held_out[0] = size[0]
    else:
        raise CorpusError(
            f"the corpus has one document of {size[0]} tokens, of which nothing can be held out from training: add "
            "more text to data.corpus"
        )
    return held_out
