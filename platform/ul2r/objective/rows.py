"""Rows: training sequences whose slots hold one example each, with attention as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ul2r.config import Denoiser, Objective, fit
from ul2r.objective.examples import Example, make_example
from ul2r.objective.randomness import Purpose, random_words, uniform
from ul2r.objective.vocabulary import Vocabulary


class WindowSource(Protocol):
    """Where raw text comes from."""

    def window(self, sample: int, length: int) -> npt.NDArray[np.int32]:
        """The first `length` raw tokens of a sample's window, of shape (length,)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of S positions; position i of a row predicts the token at i + 1 of the same slot.

    Attributes:
        tokens: Tokens read, int32 (B, S); eos on padding.
        labels: The token that follows each within its slot, int32 (B, S); 0 on padding.
        loss_mask: 1 where the label is a target, uint8 (B, S).
        lo: First key that each query sees, int32 (B, S), as a position of the row.
        hi: One past the last key that each query sees, int32 (B, S).
        position: Position within the slot, int32 (B, S).
        denoiser: Index into the objective's mixture, int8 (B, S); -1 on padding.
        sample: Sample indices of the slots, int64 (B, slots_per_row).
    """

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    lo: npt.NDArray[np.int32]
    hi: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    denoiser: npt.NDArray[np.int8]
    sample: npt.NDArray[np.int64]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Rows of the arrays that `arrays` gave."""
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(**{name: array[rows] for name, array in self.arrays().items()})


def row_bytes(objective: Objective) -> int:
    """Bytes of one row's arrays."""
    empty = _padding(0, objective, eos=0)
    return sum(array.itemsize * int(np.prod(array.shape[1:])) for array in empty.arrays().values())


def make_rows(
    rows: Sequence[int],
    *,
    objective: Objective,
    vocabulary: Vocabulary,
    seed: int,
    windows: WindowSource,
) -> Rows:
    """Make rows by their numbers in the run; row r holds samples r * slots .. r * slots + slots - 1.

    A sample's denoiser, spans and split are drawn from (seed, sample index) alone, and its raw length is the
    longest whose example fits the slot, so nothing is truncated and at most 2 positions of a slot are padding.

    One row of two slots of 12 positions. Sample 0 is R (mean span 1, rate 0.4) on the raw tokens a b c d e f,
    where c and f are masked; it leaves one position of padding. Sample 1 is S on g ... q, cut after j:

        tokens    NLU   a   b <0>   d   e <1> <0>   c <1>   f eos S2S   g   h   i   j   k   l   m   n   o   p   q
        labels      a   b <0>   d   e <1> <0>   c <1>   f eos   0   g   h   i   j   k   l   m   n   o   p   q eos
        loss_mask   0   0   0   0   0   0   1   1   1   1   1   0   0   0   0   0   1   1   1   1   1   1   1   1
        lo          0   0   0   0   0   0   0   0   0   0   0  11  12  12  12  12  12  12  12  12  12  12  12  12
        hi          7   7   7   7   7   7   7   8   9  10  11  12  17  17  17  17  17  18  19  20  21  22  23  24
        position    0   1   2   3   4   5   6   7   8   9  10  11   0   1   2   3   4   5   6   7   8   9  10  11
        denoiser    0   0   0   0   0   0   0   0   0   0   0  -1   1   1   1   1   1   1   1   1   1   1   1   1

    Args:
        rows: Numbers of the B rows.
        objective: The mixture and the shape of the rows.
        vocabulary: Ids of the special tokens.
        seed: The run's seed.
        windows: Raw text by sample index.

    Returns:
        The rows, in the order asked for.
    """
    raw_lengths = [fit(denoiser, objective.example_length) for denoiser in objective.mixture]
    made = _padding(len(rows), objective, vocabulary.eos)
    slots = objective.slots_per_row
    for line, row in enumerate(rows):
        for slot in range(slots):
            sample = row * slots + slot
            choice = choose_denoiser(objective.mixture, seed, sample)
            example = make_example(
                objective.mixture[choice],
                windows.window(sample, raw_lengths[choice]),
                vocabulary=vocabulary,
                seed=seed,
                sample=sample,
            )
            _place(example, made, line, slot * objective.slot_length, choice)
            made.sample[line, slot] = sample
    return made


def choose_denoiser(mixture: Sequence[Denoiser], seed: int, sample: int) -> int:
    """Index of the denoiser that a sample gets, drawn by the mixture's weights from (seed, sample) alone."""
    *bounds, total = accumulate(denoiser.weight for denoiser in mixture)
    (word,) = random_words(seed, Purpose.DENOISER, sample, 1).tolist()
    return sum(uniform(word) * total >= bound for bound in bounds)


def _padding(rows: int, objective: Objective, eos: int) -> Rows:
    """Rows without examples: every position an eos that sees only itself."""
    shape = rows, objective.sequence_length
    own = np.broadcast_to(np.arange(objective.sequence_length, dtype=np.int32), shape)
    return Rows(
        tokens=np.full(shape, eos, np.int32),
        labels=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.uint8),
        lo=own.copy(),
        hi=own + np.int32(1),
        position=own % np.int32(objective.slot_length),
        denoiser=np.full(shape, -1, np.int8),
        sample=np.zeros((rows, objective.slots_per_row), np.int64),
    )


def _place(example: Example, rows: Rows, line: int, begin: int, denoiser: int) -> None:
    """Write an example into the slot of row `line` that begins at `begin`.

    Inputs see all inputs; a target sees the inputs, the targets before it and itself. Without inputs that
    is plain causal attention.
    """
    length = len(example.tokens) - 1
    slot = line, slice(begin, begin + length)
    place = np.arange(length, dtype=np.int32)
    rows.tokens[slot] = example.tokens[:-1]
    rows.labels[slot] = example.tokens[1:]
    rows.loss_mask[slot] = place + 1 >= example.inputs
    rows.lo[slot] = begin
    rows.hi[slot] = begin + np.maximum(place + 1, example.inputs)
    rows.denoiser[slot] = denoiser
