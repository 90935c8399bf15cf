"""Batches: rows of training examples, one in each slot, with attention as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Objective
from ul2r.objective.denoiser_table import build_table, mode_tokens
from ul2r.objective.layout_kernels import BatchArrays, Examples, SpecialTokens, fill_batch
from ul2r.objective.random_kernels import Runs, Slots, choose_denoisers, draw_runs
from ul2r.objective.randomness import Purpose
from ul2r.objective.vocabulary import Vocabulary


class WindowSource(Protocol):
    """A source of raw text: a window of tokens for each sample."""

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Read the first tokens of samples' windows.

        Args:
            samples: Sample indices, int64 (N,); -1 for none.
            lengths: Raw tokens wanted of each, int64 (N,); reduced if a window has fewer.
            windows: Output, int32 (N, longest): sample i's tokens go to `windows[i, :lengths[i]]`.
        """


# eq=False: comparing arrays with == has no single truth value.
@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S positions; position i of a row predicts the token at i + 1 of the same slot.

    Attributes:
        tokens: Input tokens, int32 (B, S); eos on padding.
        labels: The next token of each position's slot, int32 (B, S); 0 on padding.
        loss_mask: 1 if the label is a target, uint8 (B, S).
        kv_start: First key that each query sees, int32 (B, S), as a position of the row.
        kv_end: One past the last key that each query sees, int32 (B, S).
        position_ids: Position within the slot, int32 (B, S).
        denoiser_ids: Index into the objective's mixture, int8 (B, S); -1 on padding.
        sample_ids: Sample indices of the slots, int64 (B, slots_per_row); -1 for the later slots of a row that one
            example has to itself.
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
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the batch that `to_arrays` was called on."""
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        # Slices are views, so a microbatch costs no copy.
        return Batch(**{name: array[rows] for name, array in self.to_arrays().items()})


DTYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.uint8,
    "kv_start": np.int32,
    "kv_end": np.int32,
    "position_ids": np.int32,
    "denoiser_ids": np.int8,
}
"""Types of the arrays with a value for each position."""


def bytes_per_row(objective: Objective) -> int:
    """Return the bytes of one row's arrays."""
    per_position = sum(np.dtype(dtype).itemsize for dtype in DTYPES.values())
    per_slot = np.dtype(np.int64).itemsize
    return per_position * objective.sequence_length + per_slot * objective.slots_per_row


def build_batch(
    row_indices: Sequence[int],
    *,
    objective: Objective,
    vocabulary: Vocabulary,
    seed: int,
    text_windows: WindowSource,
) -> Batch:
    """Build rows by their indices in the run.

    Row r has the samples r * slots .. r * slots + slots - 1, or the first of them alone. A sample's denoiser, spans and
    split depend only on (seed, sample index), and its raw length is the longest whose example fits the slot. So nothing
    is truncated, and at most 2 positions of a slot are padding (more if a window is short).

    One row of two slots of 12 positions. Sample 0 is R (mean_noise_span_length 1, noise_density 0.4) on the raw tokens
    a b c d e f, where c and f are masked; one position is left as padding. Sample 1 is S on g ... q, split after j:

        tokens       NLU   a   b <0>   d   e <1> <0>   c <1>   f eos S2S   g   h   i   j   k   l   m   n   o   p   q
        labels         a   b <0>   d   e <1> <0>   c <1>   f eos   0   g   h   i   j   k   l   m   n   o   p   q eos
        loss_mask      0   0   0   0   0   0   1   1   1   1   1   0   0   0   0   0   1   1   1   1   1   1   1   1
        kv_start       0   0   0   0   0   0   0   0   0   0   0  11  12  12  12  12  12  12  12  12  12  12  12  12
        kv_end         7   7   7   7   7   7   7   8   9  10  11  12  17  17  17  17  17  18  19  20  21  22  23  24
        position_ids   0   1   2   3   4   5   6   7   8   9  10  11   0   1   2   3   4   5   6   7   8   9  10  11
        denoiser_ids   0   0   0   0   0   0   0   0   0   0   0  -1   1   1   1   1   1   1   1   1   1   1   1   1

    Args:
        row_indices: Indices of the B rows.
        objective: The mixture and the shape of the rows.
        vocabulary: Ids of the special tokens.
        seed: The run's seed, 0 <= seed < 2**64.
        text_windows: Raw text by sample index.

    Returns:
        The rows, in the order of `row_indices`.
    """
    modes = tuple(mode_tokens(denoiser, vocabulary) for denoiser in objective.mixture)
    # The table is cached by its arguments: of the modes, an example's length depends on their lengths only.
    table = build_table(objective, tuple(map(len, modes)))
    assert table.num_sentinels <= len(vocabulary.sentinels), "more spans than sentinels"

    # Uninitialized: the compiled functions write every element that they read later.
    shape = (len(row_indices), objective.slots_per_row)
    slots = Slots(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64))
    # np.uint64, since numba would type a Python integer as int64, and uint64 from 2**63 on: two compiled versions.
    choose_denoisers(
        np.uint64(seed),
        np.uint64(Purpose.ROW),
        np.uint64(Purpose.DENOISER),
        table.whole_row_fraction,
        np.array(row_indices, np.int64),
        table.denoisers,
        slots,
    )

    # Reading comes before drawing runs: it reduces the lengths of short windows, and runs depend on lengths.
    windows = _read_windows(text_windows, slots)
    runs = _empty_runs(shape, table.num_sentinels)
    draw_runs(np.uint64(seed), np.uint64(Purpose.SPANS), table.denoisers, slots, runs)

    # Uninitialized: `fill_batch` writes all positions, padding included.
    positions = (len(row_indices), objective.sequence_length)
    arrays = BatchArrays(**{name: np.empty(positions, dtype) for name, dtype in DTYPES.items()})
    fill_batch(
        table.denoisers,
        SpecialTokens(
            modes=_stack_modes(modes),
            sentinels=np.array(vocabulary.sentinels, np.int32),
            eos=vocabulary.eos,
        ),
        Examples(
            denoiser_ids=slots.denoiser_ids,
            windows=windows,
            lengths=slots.lengths,
            num_spans=runs.num_spans,
            kept=runs.kept,
            masked=runs.masked,
        ),
        arrays,
    )
    return Batch(**arrays._asdict(), sample_ids=slots.samples)


def _read_windows(source: WindowSource, slots: Slots) -> npt.NDArray[np.int32]:
    """Return the raw text of every slot, int32 (B, slots, longest), and reduce the lengths of short windows."""
    # An array without rows has no maximum unless one is given.
    longest = int(slots.lengths.max(initial=0))
    # (B * slots, longest): the source reads all samples of a batch in one call.
    windows = np.empty((slots.samples.size, longest), np.int32)
    # ravel() of these contiguous arrays is a view: the source's changes to the lengths arrive in `slots`.
    source.read(slots.samples.ravel(), slots.lengths.ravel(), windows)
    return windows.reshape(*slots.samples.shape, longest)


def _empty_runs(shape: tuple[int, int], num_sentinels: int) -> Runs:
    # There are as many runs as sentinels, except in FIM (two kept runs) and in a prefix without a sentinel. A kind with
    # more runs needs more room here: compiled code does not check bounds.
    max_runs = max(num_sentinels, 2)
    return Runs(
        num_spans=np.empty(shape, np.int64),
        kept=np.empty((*shape, max_runs), np.int32),
        masked=np.empty((*shape, max_runs), np.int32),
    )


def _stack_modes(modes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int32]:
    """Return modes as int32 (D, longest), padded with zeros."""
    table = np.zeros((len(modes), max(map(len, modes))), np.int32)
    for row, mode in zip(table, modes, strict=True):
        row[: len(mode)] = mode
    return table
