"""The held-out split by tokens: how many tokens at the end of each document are kept out of training.

A long document contributes its end in proportion to its length: so a corpus of two books is not split into one to train
on and one to measure on. Of all others some are held out as a whole: those with the smallest keys that fit, which is as
good as random, does not depend on anything else, and puts equal documents on one side. Pieces that are too short to
measure on are not made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError

Keys = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

MIN_PIECE_TOKENS = 2**10
"""A document is cut if at least so many of its tokens are held out: several windows of training rows and of infilling
(131 tokens by default), since measurements on infilling take no text across the end of a document."""
MIN_PART_TOKENS = 2
"""Tokens of either part of a document that is cut: one of text, and the eos that ends the part."""
MIN_USABLE_TOKENS = 2**8
"""Shorter documents hold no window of infilling and a margin: a split of them is not much use."""
SPLIT_DTYPE = np.dtype([("key", "<u8"), ("tokens", "<i8")])
MIN_HELD_OUT = 2
"""Different documents that are held out at least, where none is cut: a standard error needs two."""
ALL_TOKENS = 2**62
"""More than any document has: it is held out as a whole."""
NUM_KEYS = 2**64


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

    Beyond its arguments it needs a few bytes for each document, and tens of bytes for each that may be held out.

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
    share = budget / total

    # Documents that are cut have this size or more, all others are shorter.
    cut_size = math.ceil(MIN_PIECE_TOKENS / share)
    is_cut = sizes >= cut_size
    cut_keys, cut_sizes, _ = _merge_copies(keys[is_cut], sizes[is_cut])
    tails = np.floor(cut_sizes * share).astype(np.int64)

    uncut_total = total - int(sizes[is_cut].sum())
    limit = math.floor(budget * (uncut_total / total))
    whole_keys, whole_sizes = _choose_whole(keys, sizes, cut_size, limit, share)

    if not len(cut_keys) and not _is_usable(whole_sizes, math.floor(budget), int(sizes.max())):
        return _hold_out_piece(keys, sizes, math.floor(budget), max_tokens)
    chosen = np.concatenate([cut_keys, whole_keys])
    order = np.argsort(chosen)
    return HeldOutSplit(chosen[order], np.concatenate([tails, whole_sizes])[order])


def choose_whole_held_out(
    keys: Keys, sizes: Int64s, fraction: float, max_tokens: int
) -> HeldOutSplit:
    """Choose what to hold out of documents that must not be cut; those of one key are held out together.

    Args:
        keys: Key of each document, uint64 (D,).
        sizes: Tokens of each, int64 (D,).
        fraction: Fraction of the tokens.
        max_tokens: Most tokens.
    """
    total = int(sizes.sum())
    budget = math.floor(min(fraction * total, max_tokens))
    chosen, _ = _choose_whole(keys, sizes, ALL_TOKENS, budget, budget / max(total, 1))
    if len(chosen) < MIN_HELD_OUT:
        # The budget is too small for them: the smallest, as long as there are others to train on.
        unique, _, with_copies = _merge_copies(keys, sizes)
        smallest = np.argsort(with_copies, kind="stable")[:MIN_HELD_OUT]
        chosen = unique[smallest[: len(unique) - 1]]
    chosen = np.sort(chosen)
    return HeldOutSplit(chosen, np.full(len(chosen), ALL_TOKENS, np.int64))


def _is_usable(whole_sizes: Int64s, budget: int, longest: int) -> bool:
    """Return whether whole documents are held out that can be measured on, or no document could hold the budget."""
    if not len(whole_sizes) or longest < budget + MIN_PART_TOKENS or budget < MIN_USABLE_TOKENS:
        return bool(len(whole_sizes))
    usable = int(whole_sizes[whole_sizes >= MIN_USABLE_TOKENS].sum())
    return 2 * usable >= budget


def _merge_copies(keys: Keys, sizes: Int64s) -> tuple[Keys, Int64s, Int64s]:
    """Return different documents in ascending order of their keys.

    Returns:
        Their keys, uint64 (U,), their tokens, and their tokens with those of all copies, both int64 (U,).
    """
    if not len(keys):
        return keys, sizes, sizes
    order = np.argsort(keys)
    ordered = keys[order]
    firsts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
    ordered_sizes = sizes[order]
    return ordered[firsts], ordered_sizes[firsts], np.add.reduceat(ordered_sizes, firsts)


def _choose_whole(
    keys: Keys, sizes: Int64s, cut_size: int, limit: int, share: float
) -> tuple[Keys, Int64s]:
    """Return the keys and sizes of documents below `cut_size` that are held out, no more than `limit` tokens.

    They are taken in ascending order of their keys; a document that with its copies does not fit any more is left to
    training.
    """
    chosen_keys = [np.empty(0, np.uint64)]
    chosen_sizes = [np.empty(0, np.int64)]
    # Keys are digests, so about `share` of the documents are in the first range, and seldom more ranges are needed.
    for first, last in _iter_key_ranges(share):
        if not limit:
            break
        is_candidate = (keys >= first) & (keys <= last) & (sizes < cut_size) & (sizes <= limit)
        range_keys, range_sizes, with_copies = _merge_copies(
            keys[is_candidate], sizes[is_candidate]
        )
        places = np.flatnonzero(with_copies <= limit)
        while len(places):
            ends = np.cumsum(with_copies[places])
            number = int(np.searchsorted(ends, limit, side="right"))
            chosen_keys.append(range_keys[places[:number]])
            chosen_sizes.append(range_sizes[places[:number]])
            limit -= int(ends[number - 1])
            # Later ones may be shorter than the one that did not fit.
            places = places[number:]
            places = places[with_copies[places] <= limit]
    return np.concatenate(chosen_keys), np.concatenate(chosen_sizes)


def _iter_key_ranges(share: float) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Yield the first and the last key of ranges that together hold all keys: that of `share` of them, then doubled."""
    first = 0
    end = max(1, int(share * NUM_KEYS))
    while first < NUM_KEYS:
        end = min(end, NUM_KEYS)
        yield np.uint64(first), np.uint64(end - 1)
        first = end
        end *= 2


def _hold_out_piece(keys: Keys, sizes: Int64s, budget: int, max_tokens: int) -> HeldOutSplit:
    """Return the split of a corpus whose documents are all longer than the budget: the end of one of them."""
    unique, size, with_copies = _merge_copies(keys, sizes)
    copies = with_copies // size
    pieces = np.minimum(budget // copies, size - MIN_PART_TOKENS)
    longest = int(pieces.argmax())
    if pieces[longest] >= MIN_PART_TOKENS:
        return HeldOutSplit(unique[[longest]], pieces[[longest]])

    # Less than a piece can have: the fraction is exceeded, max_tokens only if it is less than one piece.
    pieces = np.where(size >= 2 * MIN_PART_TOKENS, MIN_PART_TOKENS, size)
    costs = pieces * copies
    is_possible = (pieces < size) | (len(size) > 1)
    is_possible &= costs <= max(max_tokens, MIN_PART_TOKENS)
    if not is_possible.any():
        raise CorpusError(
            f"the corpus has {len(keys):,} documents, {len(size):,} of them different, the longest of {size.max():,} "
            f"tokens, of which nothing can be held out from training (data.max_held_out_tokens={max_tokens:,}): add "
            "more text to data.corpus"
        )
    least = int(np.where(is_possible, costs, costs.max() + 1).argmin())
    return HeldOutSplit(unique[[least]], pieces[[least]])
