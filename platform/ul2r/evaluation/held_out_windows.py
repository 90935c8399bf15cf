"""Held-out text to measure on: windows spread over the whole split, the same ones for every arm."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError

Tokens = npt.NDArray[np.int32]


class Store(Protocol):
    """A run of tokens."""

    def __len__(self) -> int: ...

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length), of shape (length,)."""


def select_windows(store: Store, count: int, length: int, without: int | None = None) -> Tokens:
    """Up to `count` windows that do not overlap, at equal distances over the store.

    The store is cut into `count` equal parts, fewer where it is short; each part gives one window.

    Args:
        store: Held-out tokens.
        count: Windows wanted.
        length: L, tokens of a window.
        without: A token (eos) that no window may hold; a part that has no such window gives none.

    Returns:
        int32 (B, L), 2 <= B <= count.

    Raises:
        CorpusError: If there are not two such windows, the fewest that a standard error can be had from.
    """
    parts = min(count, len(store) // length)
    size = len(store) // max(parts, 1)
    found = [_window(store.tokens(part * size, size), length, without) for part in range(parts)]
    windows = [window for window in found if window is not None]
    if len(windows) < 2:
        within = " within one document" if without is not None else ""
        raise CorpusError(
            f"the held-out split of {len(store)} tokens has {len(windows)} windows of {length} tokens{within}, and 2 "
            "are needed: raise data.held_out_fraction, give more text, or lower objective.sequence_length or "
            "evaluation.infill_context_length"
        )
    return np.stack(windows)  # (B, L)


def _window(tokens: Tokens, length: int, without: int | None) -> Tokens | None:
    """The middle of the longest stretch of `tokens` that does not hold `without`, if it is long enough."""
    breaks = np.flatnonzero(tokens == without) if without is not None else np.empty(0, np.int64)
    starts = np.concatenate(([0], breaks + 1))
    stretches = np.concatenate((breaks, [len(tokens)])) - starts
    longest = int(stretches.argmax())
    if stretches[longest] < length:
        return None
    start = int(starts[longest] + (stretches[longest] - length) // 2)
    return tokens[start : start + length]
