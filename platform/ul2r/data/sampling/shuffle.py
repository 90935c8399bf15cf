"""Random access to shuffled orders: a keyed permutation computes the position of sample k, so no table is stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.objective.random_kernels import shuffle
from ul2r.objective.randomness import Purpose

Int64s = npt.NDArray[np.int64]

SOURCE_BITS = 48
"""Low bits of a stream's index that hold the epoch; the bits above hold the number of the source."""


def index_shuffle(
    seed: int,
    purpose: Purpose,
    samples: Int64s,
    size: int,
    *,
    shift_bound: int = 1,
    source: int = 0,
) -> tuple[Int64s, Int64s]:
    """Return the positions of samples in shuffled orders, with a new order for each epoch of `size` samples.

    Args:
        seed: The run's seed.
        purpose: Purpose of the order.
        samples: Sample indices, int64 (N,); -1 is treated as sample 0.
        size: Length of an order.
        shift_bound: Shifts are in 0 .. shift_bound - 1.
        source: Number of the source; orders of different sources are independent.

    Returns:
        The shift of each sample's epoch, and the sample's position in that epoch's order, int64 (N,) each.
    """
    shifts = np.empty(len(samples), np.int64)
    positions = np.empty(len(samples), np.int64)
    # Epoch e draws from stream source * 2**48 + e, so that neither epochs nor sources share an order.
    shuffle(
        np.uint64(seed),
        np.uint64(purpose),
        source << SOURCE_BITS,
        samples,
        size,
        shift_bound,
        shifts,
        positions,
    )
    return shifts, positions
