"""Random numbers without state: word i of a stream is a function of (seed, purpose, index) alone.

Philox is a keyed bijection of a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
no draw depends on another and any process can make any sample. Only the generator's raw words are used: numpy
keeps those the same in all versions (NEP 19), which it does not promise for its distributions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


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


def random_words(seed: int, purpose: Purpose, index: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` words of the stream of (seed, purpose, index).

    Args:
        seed: The run's seed, 0 <= seed < 2**64.
        purpose: What the words are for.
        index: Sample index or epoch, 0 <= index < 2**64.
        count: Words wanted, at least 0.

    Returns:
        Uniform 64-bit words of shape (count,).
    """
    # The index fills the counter's top word: a stream is 2**192 blocks long, so streams never meet.
    generator = np.random.Philox(key=seed | purpose << 64, counter=index << 192)
    return generator.random_raw(count)


def uniform(word: int) -> float:
    """A word as a float in [0, 1): its upper 53 bits."""
    return (word >> 11) * 2.0**-53


def below(word: int, bound: int) -> int:
    """A word as an integer in [0, bound), by the high half of their product (bias below bound / 2**64)."""
    return word * bound >> 64
