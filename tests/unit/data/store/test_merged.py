"""Several stores read as one."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.data.store.merged import MergedStores
from ul2r.data.store.token_store import TokenStore, TokenWriter


class CountingStore:
    """One document whose tokens count from `first`."""

    num_documents = 1

    def __init__(self, first: int, size: int) -> None:
        self._tokens = np.arange(first, first + size, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        return np.array([0, len(self)])[first : end + 1]

    def read_document(self, number: int) -> npt.NDArray[np.int32]:
        assert number == 0
        return self._tokens

    def read_tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        assert start >= 0
        assert start + length <= len(self)
        return self._tokens[start : start + length]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(-30, 60), st.integers(0, 70)
)
def test_merged_stores_read_as_one_circular_sequence(
    sizes: list[int], start: int, length: int
) -> None:
    begins = np.cumsum([0, *sizes]).tolist()
    merged = MergedStores([CountingStore(*pair) for pair in zip(begins, sizes, strict=False)])
    total = sum(sizes)
    expected = [position % total for position in range(start, start + length)]
    assert merged.read_tokens(start, length).tolist() == expected


def test_documents_of_merged_stores_are_concatenated(tmp_path: Path) -> None:
    documents = [[1, 2], [3], [4, 5, 6], [7]]
    for name, part in {"a": documents[:1], "b": documents[1:]}.items():
        with TokenWriter(tmp_path / name, 100) as writer:
            for tokens in part:
                writer.append(tokens)
                writer.end_document()

    merged = MergedStores([TokenStore.open(tmp_path / name) for name in "ab"])
    assert (len(merged), merged.num_documents) == (7, 4)
    assert [merged.read_document(number).tolist() for number in range(4)] == documents
    bounds = [0, 2, 3, 6, 7]
    for first, end in combinations(range(5), 2):
        assert merged.document_bounds(first, end).tolist() == bounds[first : end + 1]
    for number in (-1, 4):
        with pytest.raises(IndexError):
            merged.read_document(number)
