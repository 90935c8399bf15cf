"""Batches: rows of training examples, one in each slot, with attention as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Objective
from ul2r.objective.denoiser_table import DenoiserTable, build_table, mode_tokens
from ul2r.objective.layout_kernels import BatchArrays, Examples, SpecialTokens, fill_batch
from ul2r.objective.pairs import Int64s, PairSource, locate_rows
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
        position_ids: Position within the example, int32 (B, S).
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
    pairs: PairSource | None = None,
) -> Batch:
    """Build rows by their indices in the run.

    Row r has the samples r * slots .. r * slots + slots - 1, or the first of them alone. A sample's denoiser, spans and
    split depend only on (seed, sample index), and its raw length is the longest whose example fits the slot. So nothing
    is truncated, and at most 2 positions of a slot are padding (more if a window is short).

    A slot of a row of pairs has several examples, one behind the other, each of which sees itself alone.

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
        text_windows: Raw text by sample index; rows of pairs are not counted.
        pairs: Pairs by the number of their slot, for a mixture that has them.

    Returns:
        The rows, in the order of `row_indices`.
    """
    modes = tuple(mode_tokens(denoiser, vocabulary) for denoiser in objective.mixture)
    # The table is cached by its arguments: of the modes, an example's length depends on their lengths only.
    table = build_table(objective, tuple(map(len, modes)))
    assert table.num_sentinels <= len(vocabulary.sentinels), "more spans than sentinels"

    rows = np.array(row_indices, np.int64)
    if table.pairs_id < 0:
        slots = _choose_slots(rows, objective, table.denoisers, table.whole_row_fraction, seed)
        # Reading comes before drawing runs: it reduces the lengths of short windows, and runs depend on lengths.
        windows = _read_windows(text_windows, slots)
        runs = _empty_runs(slots.samples.shape, table.num_sentinels)
    else:
        assert pairs is not None, "a mixture with pairs, but no source of them"
        slots, numbers = _choose_slots_with_pairs(rows, objective, table, seed)
        windows = _read_windows(text_windows, slots, numbers.text)
        runs = _empty_runs(slots.samples.shape, max(table.num_sentinels, pairs.max_pairs))
        _read_pairs(pairs, numbers.pairs, slots, windows, runs)
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


class _Numbers(NamedTuple):
    """Numbers of slots on their own side, int64 (B, slots) each; -1 for those of the other one."""

    text: Int64s
    pairs: Int64s


def _choose_slots(
    rows: Int64s,
    objective: Objective,
    denoisers: npt.NDArray[Any],
    whole_row_fraction: float,
    seed: int,
) -> Slots:
    """Draw the denoisers of rows of text."""
    # Uninitialized: the compiled functions write every element that they read later.
    shape = (len(rows), objective.slots_per_row)
    slots = Slots(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64))
    # np.uint64, since numba would type a Python integer as int64, and uint64 from 2**63 on: two compiled versions.
    choose_denoisers(
        np.uint64(seed),
        np.uint64(Purpose.ROW),
        np.uint64(Purpose.DENOISER),
        whole_row_fraction,
        rows,
        denoisers,
        slots,
    )
    return slots


def _choose_slots_with_pairs(
    rows: Int64s, objective: Objective, table: DenoiserTable, seed: int
) -> tuple[Slots, _Numbers]:
    """Draw the denoisers of rows of text, and put pairs into the others."""
    is_pairs, row_numbers = locate_rows(rows, objective.num_pair_rows)
    slots_per_row = objective.slots_per_row
    slot = np.arange(slots_per_row)
    pairs = table.denoisers[table.pairs_id]
    is_used = (slot == 0) if pairs["whole_row"] else (slot >= 0)
    of_row = 1 if pairs["whole_row"] else slots_per_row

    # First as if all rows were rows of pairs; those of text are drawn as without pairs.
    samples = np.where(is_used, rows[:, None] * slots_per_row + slot, -1)
    slots = Slots(
        samples=samples,
        denoiser_ids=np.where(is_used, table.pairs_id, np.full_like(samples, -1)),
        lengths=np.where(is_used, pairs["raw_length"], np.zeros_like(samples)),
    )
    text_ids = np.flatnonzero(np.arange(len(table.denoisers)) != table.pairs_id)
    if not is_pairs.all():
        text_denoisers = table.denoisers[text_ids]
        text = _choose_slots(
            rows[~is_pairs], objective, text_denoisers, table.whole_row_fraction, seed
        )
        slots.samples[~is_pairs] = text.samples
        # The last entry is for empty slots, whose id is -1.
        slots.denoiser_ids[~is_pairs] = np.append(text_ids, -1)[text.denoiser_ids]
        slots.lengths[~is_pairs] = text.lengths

    # Each side counts its own slots, so that text and pairs are read without gaps.
    text_numbers = row_numbers[:, None] * slots_per_row + slot
    pair_numbers = row_numbers[:, None] * of_row + slot
    is_slot = slots.samples >= 0
    return slots, _Numbers(
        text=np.where(is_slot & ~is_pairs[:, None], text_numbers, -1),
        pairs=np.where(is_slot & is_pairs[:, None], pair_numbers, -1),
    )


def _read_windows(
    source: WindowSource, slots: Slots, numbers: Int64s | None = None
) -> npt.NDArray[np.int32]:
    """Return the raw text of every slot, int32 (B, slots, longest), and reduce the lengths of short windows.

    Args:
        source: The text.
        slots: The slots.
        numbers: Number of each slot among those of text, int64 (B, slots); -1 for one that is not. By default all are.
    """
    # An array without rows has no maximum unless one is given.
    longest = int(slots.lengths.max(initial=0))
    # (B * slots, longest): the source reads all samples of a batch in one call.
    windows = np.empty((slots.samples.size, longest), np.int32)
    # ravel() of these contiguous arrays is a view: the source's changes to the lengths arrive in `slots`.
    if numbers is None:
        source.read(slots.samples.ravel(), slots.lengths.ravel(), windows)
    elif (numbers >= 0).any():
        is_text = numbers >= 0
        lengths = np.where(is_text, slots.lengths, 0)
        source.read(numbers.ravel(), lengths.ravel(), windows)
        slots.lengths[is_text] = lengths[is_text]
    return windows.reshape(*slots.samples.shape, longest)


def _read_pairs(
    source: PairSource, numbers: Int64s, slots: Slots, windows: npt.NDArray[np.int32], runs: Runs
) -> None:
    """Read the pairs of a batch, in one call as text is."""
    num_slots = numbers.size
    source.read(
        numbers.ravel(),
        slots.lengths.ravel(),
        windows.reshape(num_slots, -1),
        Runs(
            num_spans=runs.num_spans.ravel(),
            kept=runs.kept.reshape(num_slots, -1),
            masked=runs.masked.reshape(num_slots, -1),
        ),
    )


def _empty_runs(shape: tuple[int, ...], max_spans: int) -> Runs:
    # There are as many runs as sentinels or pairs, except in FIM (two kept runs) and in a prefix without a sentinel. A
    # kind with more runs needs more room here: compiled code does not check bounds.
    max_runs = max(max_spans, 2)
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
