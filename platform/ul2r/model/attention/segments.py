"""Rows cut into segments that a variable-length attention kernel can compute: full ones and causal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
BREAK, FULL, CAUSAL = range(3)
"""Kinds of change of a query's interval from the query before it: a new one, the same keys, or one key more."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one call of a variable-length kernel, concatenated.

    Attributes:
        queries: Positions of the segments' queries among the microbatch's S * B, int64 (Tq,).
        keys: Positions of their keys, int64 (Tk,).
        query_bounds: Start of each segment's queries, and the end of the last one's, int32 (N + 1,).
        key_bounds: The same for their keys, int32 (N + 1,).
        max_queries: Queries of the longest segment.
        max_keys: Keys of the segment with the most.
    """

    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A microbatch's attention as two calls.

    Attributes:
        full: Segments whose queries all see all keys: an example's inputs.
        causal: Segments whose last query sees all keys, and each before it one less: targets, over inputs and targets.
        isolated: Positions of queries that see only themselves (padding), int64; attention returns their value.
        inverse: Index of each of the S * B positions in the concatenation of full, causal and isolated, int64.
    """

    full: Segments
    causal: Segments
    isolated: Tensor
    inverse: Tensor


def plan_segments(kv_start: Ints, kv_end: Ints, device: torch.device) -> Plan:
    """Cut rows into the longest segments of one kind.

    Positions are those of flattened (S, B) tensors: s * B + b.

        kv_end - kv_start of one row   3 3 3 | 4 5 6  || 1 2 3  || 1         (|| where kv_start changes)
        segments                       full  | causal || causal || isolated

    Args:
        kv_start: First key each query sees, int (B, S).
        kv_end: One past the last, int (B, S); kv_start < kv_end.
        device: Device on which attention is computed.
    """
    assert (kv_start < kv_end).all(), "a query that sees no key"
    num_rows, length = kv_start.shape
    link = _link_queries(kv_start, kv_end)
    starts = np.flatnonzero(_find_starts(link))
    lengths = np.diff(starts, append=kv_start.size)

    # A segment is of the kind in which its second query continues the first. A single query sees all its keys, so it
    # fits either kind.
    # The minimum is for a segment of one query at the very end, whose kind does not depend on what is read here.
    second = link.ravel()[np.minimum(starts + 1, kv_start.size - 1)]
    kind = np.where(lengths > 1, second, CAUSAL)
    row, column = np.divmod(starts, length)
    first_key = kv_start.ravel()[starts].astype(np.int64)
    end_key = kv_end.ravel()[starts + lengths - 1].astype(np.int64)
    num_keys = end_key - first_key
    is_isolated = (lengths == 1) & (first_key == column) & (end_key == column + 1)

    def to_positions(places: Ints) -> Ints:
        """Convert row-major places b * S + s to positions s * B + b."""
        b, s = np.divmod(places, length)
        positions: Ints = s * num_rows + b
        return positions

    def select(chosen: npt.NDArray[np.bool_]) -> tuple[Ints, Segments]:
        queries = to_positions(_expand_ranges(starts[chosen], lengths[chosen]))
        first_place = row[chosen] * length + first_key[chosen]
        keys = to_positions(_expand_ranges(first_place, num_keys[chosen]))
        return queries, _make_segments(queries, keys, lengths[chosen], num_keys[chosen], device)

    full_queries, full = select((kind == FULL) & ~is_isolated)
    causal_queries, causal = select((kind == CAUSAL) & ~is_isolated)
    isolated = to_positions(starts[is_isolated])
    order = np.concatenate([full_queries, causal_queries, isolated])
    # Results come in the order of the two calls: position p finds its own at inverse[p].
    inverse = np.empty(kv_start.size, np.int64)
    inverse[order] = np.arange(kv_start.size)
    return Plan(full, causal, _to_device(isolated, device), _to_device(inverse, device))


def _link_queries(kv_start: Ints, kv_end: Ints) -> npt.NDArray[np.int8]:
    """Return how each query continues the one before it, (B, S); the first query of a row is a BREAK."""
    num_more = np.diff(kv_end, axis=1)
    has_same_start = np.diff(kv_start, axis=1) == 0
    link = np.full(kv_start.shape, BREAK, np.int8)
    link[:, 1:][has_same_start & (num_more == 0)] = FULL
    link[:, 1:][has_same_start & (num_more == 1)] = CAUSAL
    return link


def _find_starts(link: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Return which queries start a segment: those that continue differently from the query before them."""
    before = np.zeros_like(link)
    before[:, 1:] = link[:, :-1]
    starts: npt.NDArray[np.bool_] = (link == BREAK) | ((link != before) & (before != BREAK))
    return starts


def _expand_ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate the ranges start .. start + length - 1."""
    # Starts 5 and 9 of lengths 2 and 3: 5 and 7 repeated, plus 0 1 2 3 4, is 5 6 9 10 11.
    before = np.cumsum(lengths) - lengths
    ranges: Ints = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return ranges


def _make_segments(
    queries: Ints, keys: Ints, query_lengths: Ints, key_lengths: Ints, device: torch.device
) -> Segments:
    return Segments(
        queries=_to_device(queries, device),
        keys=_to_device(keys, device),
        query_bounds=_to_device(_sum_lengths(query_lengths), device),
        key_bounds=_to_device(_sum_lengths(key_lengths), device),
        max_queries=int(query_lengths.max(initial=0)),
        max_keys=int(key_lengths.max(initial=0)),
    )


def _sum_lengths(lengths: Ints) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
