"""Packing: examples of given sizes into as few slots as possible, without drawing anything.

No other module's compiled functions are used (`ul2r.objective.compiled` says why).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ul2r.objective.compiled import compiled

Int64s = npt.NDArray[np.int64]


@compiled
def pack_best_fit(sizes: Int64s, capacity: int, slots: Int64s) -> int:
    """Assign items to slots: each to the fullest one that still has room, else to a new one.

    With the largest items first this is best-fit decreasing, which needs at most 11/9 of the fewest slots, and a few
    more (Johnson 1973).

    Args:
        sizes: Sizes in the order of packing, int64 (N,), each in 1 .. capacity.
        capacity: Size of a slot.
        slots: Output, the slot of each item, int64 (N,).

    Returns:
        The number of slots.
    """
    # Slots by the room that is left: a linked list for each number, whose last slot is taken first.
    last_with = np.full(capacity + 1, -1, np.int64)
    before = np.empty(len(sizes), np.int64)
    # One bit for each number, 64 to a word, so that the smallest sufficient one is found in a few steps.
    num_words = capacity // 64 + 1
    is_open = np.zeros(num_words, np.uint64)
    num_slots = 0
    for item in range(len(sizes)):
        size = sizes[item]
        room = find_bit(is_open, size)
        if room < 0:
            slot = num_slots
            num_slots += 1
            room = capacity
        else:
            slot = last_with[room]
            last_with[room] = before[slot]
            if last_with[room] < 0:
                is_open[room >> 6] &= ~(np.uint64(1) << np.uint64(room & 63))

        slots[item] = slot
        room -= size
        if room:
            before[slot] = last_with[room]
            last_with[room] = slot
            is_open[room >> 6] |= np.uint64(1) << np.uint64(room & 63)
    return num_slots


@compiled
def find_bit(words: npt.NDArray[np.uint64], first: int) -> int:
    """Return the index of the first bit that is set from `first` on, -1 if there is none."""
    word = first >> 6
    bits = words[word] >> np.uint64(first & 63) << np.uint64(first & 63)
    while not bits:
        word += 1
        if word == len(words):
            return -1
        bits = words[word]
    # The lowest set bit alone, and its number by halving.
    number = word << 6
    lowest = bits & (~bits + np.uint64(1))
    for shift in (32, 16, 8, 4, 2, 1):
        if lowest >> np.uint64(shift):
            lowest >>= np.uint64(shift)
            number += shift
    return number
