"""Rows of pairs among the rows of text: which rows they are, and where their pairs come from."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ul2r.config.objective import ROW_BLOCK
from ul2r.objective.random_kernels import Runs

Int64s = npt.NDArray[np.int64]
NumRows = TypeVar("NumRows", int, Int64s)


class PairSource(Protocol):
    """A source of prompts with their answers: as many as fit, for each slot."""

    @property
    def max_pairs(self) -> int:
        """Most pairs of a slot."""

    def read(
        self, numbers: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32], runs: Runs
    ) -> None:
        """Read the pairs of slots.

        Args:
            numbers: Number of each slot among those of pairs, int64 (N,); -1 for one that is no slot of pairs.
            lengths: Output, int64 (N,): tokens of all prompts and answers of a slot. Here and below only slots of pairs
                are written.
            windows: Output, int32 (N, longest): prompt and answer of each pair in turn.
            runs: Output, (N, ...): the number of pairs, the lengths of their prompts (kept) and answers (masked).
        """


def count_pair_rows(num_rows: NumRows, share: int) -> NumRows:
    """Return how many of the first rows of a run hold pairs.

    They are spread evenly: of any number of successive rows, pairs have their share to within one row.

    Args:
        num_rows: A number of rows, or several, int64 (N,); at most 2**48.
        share: Rows of pairs in each `ROW_BLOCK`.
    """
    # 2**48 rows times 10,000 stay below 2**63.
    return num_rows * share // ROW_BLOCK


def locate_rows(row_indices: Int64s, share: int) -> tuple[npt.NDArray[np.bool_], Int64s]:
    """Return whether each row holds pairs, bool (B,), and its number among the rows of its side, int64 (B,).

    Args:
        row_indices: Row indices of the run, int64 (B,).
        share: Rows of pairs in each `ROW_BLOCK`.
    """
    before = count_pair_rows(row_indices, share)
    is_pairs = count_pair_rows(row_indices + 1, share) > before
    return is_pairs, np.where(is_pairs, before, row_indices - before)
