"""Random numbers without state: word i of a stream is a function of (seed, purpose, index) alone.

Philox is a keyed bijection of a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
no draw depends on another and any process can make any sample.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ul2r.objective.kernels import fill_words


class Purpose(IntEnum):
    """What a stream of random words is for; streams of different purposes are independent.

    The numbers are part of what a seed means: changing one changes every run.
    """

    DENOISER = 1
    """Which denoiser sample `index` gets."""
    SPANS = 2
    """Where the spans, or the split, of sample `index` fall."""
    ORDER = 3
    """The order and shift of the windows in epoch `index`."""
    ROW = 4
    """Whether row `index` belongs to one example that has it whole."""
    BLEND = 5
    """The order of the stores in block `index` of a blend."""
    SEGMENT = 6
    """The order and shift of the windows in a segment of a streamed store; `index` holds its number and the store's."""


def random_words(seed: int, purpose: Purpose, index: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` words of the stream of (seed, purpose, index).

    Args:
        seed: The run's seed, 0 <= seed < 2**64.
        purpose: What the words are for.
        index: Sample index, row or epoch, 0 <= index < 2**63.
        count: Words wanted, at least 0.

    Returns:
        Uniform 64-bit words of shape (count,).
    """
    words = np.empty(count, np.uint64)
    fill_words(np.uint64(seed), np.uint64(purpose), index, words)
    return words


def below(word: int, bound: int) -> int:
    """A word as an integer in [0, bound), by the high half of their product (bias below bound / 2**64)."""
    return word * bound >> 64
