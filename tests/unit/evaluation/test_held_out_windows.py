"""Held-out windows: apart, spread out, within a document where asked."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from ul2r.errors import CorpusError
from ul2r.evaluation.held_out_windows import TokenArray, select_windows

EOS = -1


class Numbered:
    """Token i is i, except eos at the places given."""

    def __init__(self, length: int, eos: list[int]) -> None:
        self.all = np.arange(length, dtype=np.int32)
        self.all[eos] = EOS

    def __len__(self) -> int:
        return len(self.all)

    def read_tokens(self, start: int, length: int) -> TokenArray:
        return self.all[start : start + length]


def test_windows_without_a_condition_stand_at_equal_distances() -> None:
    windows = select_windows(Numbered(100, []), max_windows=5, length=8)
    assert windows[:, 0].tolist() == [6, 26, 46, 66, 86]
    assert (np.diff(windows, axis=1) == 1).all()


def test_a_short_store_gives_fewer_windows_instead_of_overlapping_ones() -> None:
    assert select_windows(Numbered(30, []), max_windows=64, length=10)[:, 0].tolist() == [0, 10, 20]


@given(
    length=st.integers(40, 400),
    window=st.integers(2, 8),
    count=st.integers(2, 12),
    places=st.lists(st.integers(0, 39), max_size=4),
)
def test_windows_are_whole_apart_and_within_one_document(
    length: int, window: int, count: int, places: list[int]
) -> None:
    store = Numbered(length, places)
    try:
        windows = select_windows(store, count, window, excluded_token=EOS)
    except CorpusError:
        windows = np.empty((0, window), np.int32)
    if not places:
        assert len(windows) == min(count, length // window)
    assert len(windows) <= count
    assert (np.diff(windows, axis=1) == 1).all()  # no eos inside, nothing skipped
    assert (np.diff(windows[:, 0]) >= window).all()


def test_text_too_short_for_two_windows_is_refused_with_its_numbers() -> None:
    with pytest.raises(CorpusError, match="15 tokens has 1 windows of 10 tokens, but at least 2 are needed"):
        select_windows(Numbered(15, []), max_windows=4, length=10)
    with pytest.raises(CorpusError, match="0 windows of 10 tokens within one document"):
        select_windows(Numbered(40, list(range(0, 40, 5))), max_windows=4, length=10, excluded_token=EOS)
