"""Rows cut into segments that a variable-length attention kernel knows: full ones and causal ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
BREAK, FULL, CAUSAL = range(3)
"""How a query's interval goes on from that of the query before it: not, with the same keys, or with one more."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments for one call of a variable-length kernel, one behind the other.

    Attributes:
        queries: Positions of the segments' queries among the microbatch's S * B, int64 (Tq,).
        keys: Positions of their keys, int64 (Tk,).
        query_bounds: Where each segment's queries begin, and the last one's end, int32 (N + 1,).
        key_bounds: The same of their keys.
        longest_query: Most queries of a segment.
        longest_key: Most keys of a segment.
    """

    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A microbatch's attention as two calls.

    Attributes:
        full: Segments whose queries all see all keys: an example's inputs.
        causal: Segments whose last query sees all keys, and each before it one less: inputs and targets for targets.
        alone: Positions of queries that see nothing but themselves (padding), int64; attention gives them their value.
        inverse: Place of each of the S * B positions among those of full, causal and alone, int64.
    """

    full: Segments
    causal: Segments
    alone: Tensor
    inverse: Tensor


def plan_segments(kv_start: Ints, kv_end: Ints, device: torch.device) -> Plan:
    """Cut rows into the longest segments that are of one kind.

    Positions are those of (S, B) tensors laid flat: s * B + b.

        kv_end - kv_start of one row       3 3 3 4 5 6 | 1 2 3 | 1   (| where kv_start changes)
        segments                 full  causal causal alone

    Args:
        kv_start: First key each query sees, int (B, S).
        kv_end: One past the last, int (B, S); kv_start < kv_end.
        device: Where the attention is computed.
    """
    assert (kv_start < kv_end).all(), "a query that sees no key"
    size, length = kv_start.shape
    link = _links(kv_start, kv_end)
    starts = np.flatnonzero(_begins(link))
    lengths = np.diff(starts, append=kv_start.size)
    goes_on = link.ravel()[np.minimum(starts + 1, kv_start.size - 1)]
    kind = np.where(lengths > 1, goes_on, CAUSAL)
    row, column = np.divmod(starts, length)
    first = kv_start.ravel()[starts].astype(np.int64)
    end = kv_end.ravel()[starts + lengths - 1].astype(np.int64)
    alone = (lengths == 1) & (first == column) & (end == column + 1)

    def flat(places: Ints) -> Ints:
        """Row-major places (b, s) as positions s * B + b."""
        b, s = np.divmod(places, length)
        positions: Ints = s * size + b
        return positions

    def chosen(which: npt.NDArray[np.bool_]) -> tuple[Ints, Segments]:
        queries = flat(_ranges(starts[which], lengths[which]))
        keys = flat(_ranges(row[which] * length + first[which], (end - first)[which]))
        return queries, _segments(queries, keys, lengths[which], (end - first)[which], device)

    full_queries, full = chosen((kind == FULL) & ~alone)
    causal_queries, causal = chosen((kind == CAUSAL) & ~alone)
    alone_queries = flat(starts[alone])
    order = np.concatenate([full_queries, causal_queries, alone_queries])
    inverse = np.empty(kv_start.size, np.int64)
    inverse[order] = np.arange(kv_start.size)
    return Plan(full, causal, _on(alone_queries, device), _on(inverse, device))


def _links(kv_start: Ints, kv_end: Ints) -> npt.NDArray[np.int8]:
    """How each query follows the one before it in its row, (B, S); the first of a row does not."""
    more, same = np.diff(kv_end, axis=1), np.diff(kv_start, axis=1) == 0
    link = np.full(kv_start.shape, BREAK, np.int8)
    link[:, 1:][same & (more == 0)] = FULL
    link[:, 1:][same & (more == 1)] = CAUSAL
    return link


def _begins(link: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Whether a query begins a segment: it does not go on from the one before it as that one did."""
    before = np.zeros_like(link)
    before[:, 1:] = link[:, :-1]
    begins: npt.NDArray[np.bool_] = (link == BREAK) | ((link != before) & (before != BREAK))
    return begins


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The numbers start .. start + length - 1 of every range, one behind the other."""
    before = np.cumsum(lengths) - lengths
    ranges: Ints = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return ranges


def _segments(
    queries: Ints, keys: Ints, query_lengths: Ints, key_lengths: Ints, device: torch.device
) -> Segments:
    return Segments(
        queries=_on(queries, device),
        keys=_on(keys, device),
        query_bounds=_on(_bounds(query_lengths), device),
        key_bounds=_on(_bounds(key_lengths), device),
        longest_query=int(query_lengths.max(initial=0)),
        longest_key=int(key_lengths.max(initial=0)),
    )


def _bounds(lengths: Ints) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _on(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
