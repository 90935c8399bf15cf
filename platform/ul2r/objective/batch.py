"""Rows: training sequences whose slots hold one example each, with attention as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Denoiser, Objective, Prefix, SpanCorruption
from ul2r.objective import kernels
from ul2r.objective.randomness import Purpose
from ul2r.objective.vocabulary import Vocabulary

KINDS = {
    "span_corruption": kernels.CORRUPTION,
    "prefix": kernels.PREFIX,
    "fim": kernels.FIM,
    "causal": kernels.CAUSAL,
}


class WindowSource(Protocol):
    """Where raw text comes from."""

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Read the beginnings of samples' windows.

        Args:
            samples: Sample indices, int64 (N,); -1 for none.
            lengths: Raw tokens wanted of each, int64 (N,); made less where a window has fewer.
            windows: Where they go: sample i's to `windows[i, :lengths[i]]`, int32 (N, longest).
        """


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S positions; position i of a row predicts the token at i + 1 of the same slot.

    Attributes:
        tokens: Tokens read, int32 (B, S); eos on padding.
        labels: The token that follows each within its slot, int32 (B, S); 0 on padding.
        loss_mask: 1 where the label is a target, uint8 (B, S).
        kv_start: First key that each query sees, int32 (B, S), as a position of the row.
        kv_end: One past the last key that each query sees, int32 (B, S).
        position_ids: Position within the slot, int32 (B, S).
        denoiser_ids: Index into the objective's mixture, int8 (B, S); -1 on padding.
        sample_ids: Sample indices of the slots, int64 (B, slots_per_row); -1 for a slot that the one before it takes up.
    """

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    kv_start: npt.NDArray[np.int32]
    kv_end: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int32]
    denoiser_ids: npt.NDArray[np.int8]
    sample_ids: npt.NDArray[np.int64]

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Rows of the arrays that `arrays` gave."""
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(**{name: array[rows] for name, array in self.to_arrays().items()})


TYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.uint8,
    "kv_start": np.int32,
    "kv_end": np.int32,
    "position_ids": np.int32,
    "denoiser_ids": np.int8,
}
"""Of the arrays with a number for each position."""


def bytes_per_row(objective: Objective) -> int:
    """Bytes of one row's arrays."""
    position = sum(np.dtype(dtype).itemsize for dtype in TYPES.values())
    return position * objective.sequence_length + 8 * objective.slots_per_row


def build_batch(
    rows: Sequence[int],
    *,
    objective: Objective,
    vocabulary: Vocabulary,
    seed: int,
    text_windows: WindowSource,
) -> Batch:
    """Make rows by their numbers in the run; row r holds samples r * slots .. r * slots + slots - 1 or the first alone.

    A sample's denoiser, spans and split are drawn from (seed, sample index) alone, and its raw length is the
    longest whose example fits the slot, so nothing is truncated and at most 2 positions of a slot are padding (more
    where a window is short).

    One row of two slots of 12 positions. Sample 0 is R (mean span 1, rate 0.4) on the raw tokens a b c d e f,
    where c and f are masked; it leaves one position of padding. Sample 1 is S on g ... q, cut after j:

        tokens    NLU   a   b <0>   d   e <1> <0>   c <1>   f eos S2S   g   h   i   j   k   l   m   n   o   p   q
        labels      a   b <0>   d   e <1> <0>   c <1>   f eos   0   g   h   i   j   k   l   m   n   o   p   q eos
        loss_mask   0   0   0   0   0   0   1   1   1   1   1   0   0   0   0   0   1   1   1   1   1   1   1   1
        kv_start          0   0   0   0   0   0   0   0   0   0   0  11  12  12  12  12  12  12  12  12  12  12  12  12
        kv_end          7   7   7   7   7   7   7   8   9  10  11  12  17  17  17  17  17  18  19  20  21  22  23  24
        position_ids 0   1   2   3   4   5   6   7   8   9  10  11   0   1   2   3   4   5   6   7   8   9  10  11
        denoiser_ids 0   0   0   0   0   0   0   0   0   0   0  -1   1   1   1   1   1   1   1   1   1   1   1   1

    Args:
        rows: Numbers of the B rows.
        objective: The mixture and the shape of the rows.
        vocabulary: Ids of the special tokens.
        seed: The run's seed, 0 <= seed < 2**64.
        text_windows: Raw text by sample index.

    Returns:
        The rows, in the order asked for.
    """
    modes = tuple(mode_tokens(denoiser, vocabulary) for denoiser in objective.mixture)
    plan = _plan(objective, tuple(map(len, modes)))
    assert plan.sentinels <= len(vocabulary.sentinels), "more spans than sentinels"
    shape = len(rows), objective.slots_per_row
    slots = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64)
    samples, _, lengths = slots
    kernels.choose_denoisers(
        np.uint64(seed),
        (np.uint64(Purpose.ROW), np.uint64(Purpose.DENOISER)),
        plan.whole_share,
        np.array(rows, np.int64),
        plan.denoisers,
        slots,
    )
    text = np.empty((samples.size, int(lengths.max(initial=0))), np.int32)
    text_windows.read(samples.ravel(), lengths.ravel(), text)
    positions = len(rows), objective.sequence_length
    arrays = {name: np.empty(positions, dtype) for name, dtype in TYPES.items()}
    kernels.fill_rows(
        np.uint64(seed),
        np.uint64(Purpose.SPANS),
        plan.denoisers,
        (
            _side_by_side(modes),
            np.array(vocabulary.sentinels, np.int32),
            vocabulary.eos,
        ),
        slots,
        text,
        tuple(arrays.values()),
    )
    return Batch(**arrays, sample_ids=samples)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What rows of an objective are made by."""

    denoisers: npt.NDArray[Any]
    """The mixture as the kernels read it."""
    whole_share: float
    """Share of the rows that one example has whole, such that a denoiser's share of the examples is its weight's."""
    sentinels: int
    """Sentinels that the longest example needs."""


@lru_cache(maxsize=64)
def _plan(objective: Objective, lengths: tuple[int, ...]) -> _Plan:
    table = np.zeros(len(objective.mixture), kernels.DENOISER)
    weights = {True: 0.0, False: 0.0}
    for one, denoiser, marks in zip(table, objective.mixture, lengths, strict=True):
        weights[denoiser.whole_row] += denoiser.weight
        one["kind"] = KINDS[denoiser.kind]
        one["length"] = objective.raw_length(denoiser, marks)
        one["marks"] = marks
        one["prefix"] = objective.attention == "prefix"
        one["closed"] = objective.eos_after_inputs
        one["whole"] = denoiser.whole_row
        one["bound"] = weights[denoiser.whole_row]
        if denoiser.kind == "span_corruption":
            one["mean_noise_span_length"], one["rate"] = (
                denoiser.mean_noise_span_length,
                denoiser.noise_density,
            )
        elif denoiser.kind == "prefix":
            one["rate"], one["sentinels"] = denoiser.noise_density or 0.0, denoiser.sentinel
    rows_of_shared = weights[False] / objective.slots_per_row
    return _Plan(
        table, weights[True] / (weights[True] + rows_of_shared), objective.num_sentinels_needed
    )


def mode_tokens(denoiser: Denoiser, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens of a denoiser's mode, none if it has none."""
    if isinstance(denoiser, SpanCorruption | Prefix):
        return vocabulary.modes[denoiser.mode]
    return ()


def _side_by_side(modes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int32]:
    """Modes as int32 (D, longest), the shorter ones filled up with zeros."""
    table = np.zeros((len(modes), max(map(len, modes))), np.int32)
    for line, mode in zip(table, modes, strict=True):
        line[: len(mode)] = mode
    return table
