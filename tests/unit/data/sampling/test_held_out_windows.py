"""Held-out windows do not overlap, are evenly spread, and lie within a document where required."""

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from ul2r.data.sampling.held_out_windows import TokenArray, describe_small_split, select_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.launch.preflight import check_run
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

EOS = -1


class NumberedStore:
    """Store whose token i is i, except for eos at the given positions."""

    def __init__(self, length: int, eos_positions: list[int]) -> None:
        self.all = np.arange(length, dtype=np.int32)
        self.all[eos_positions] = EOS

    def __len__(self) -> int:
        return len(self.all)

    def read_tokens(self, start: int, length: int) -> TokenArray:
        return self.all[start : start + length]


def test_windows_are_evenly_spread() -> None:
    windows = select_windows(NumberedStore(100, []), max_windows=5, length=8)

    assert windows[:, 0].tolist() == [6, 26, 46, 66, 86]
    assert (np.diff(windows, axis=1) == 1).all()


def test_a_short_store_gives_fewer_windows_rather_than_overlapping_ones() -> None:
    windows = select_windows(NumberedStore(30, []), max_windows=64, length=10)

    assert windows[:, 0].tolist() == [0, 10, 20]


@given(
    num_tokens=st.integers(40, 400),
    length=st.integers(2, 8),
    max_windows=st.integers(2, 12),
    eos_positions=st.lists(st.integers(0, 39), max_size=4),
)
def test_windows_are_contiguous_disjoint_and_within_one_document(
    num_tokens: int, length: int, max_windows: int, eos_positions: list[int]
) -> None:
    store = NumberedStore(num_tokens, eos_positions)
    try:
        windows = select_windows(store, max_windows, length, excluded_token=EOS)
    except CorpusError:
        windows = np.empty((0, length), np.int32)

    if not eos_positions:
        assert len(windows) == min(max_windows, num_tokens // length)
    assert len(windows) <= max_windows
    assert (np.diff(windows, axis=1) == 1).all()  # no eos inside, no token left out
    assert (np.diff(windows[:, 0]) >= length).all()


def test_text_too_short_for_two_windows_is_refused_with_its_numbers() -> None:
    with pytest.raises(
        CorpusError, match="15 tokens has 1 windows of 10 tokens, but at least 2 are needed"
    ):
        select_windows(NumberedStore(15, []), max_windows=4, length=10)

    documents = NumberedStore(40, list(range(0, 40, 5)))
    with pytest.raises(CorpusError, match="0 windows of 10 tokens within one document"):
        select_windows(documents, max_windows=4, length=10, excluded_token=EOS)


def test_split_in_pieces_without_windows_is_said(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, validation={"num_rows": 2}, evaluation={"num_rows": 2})
    length = 2 * recipe.evaluation.infill_context_length + recipe.evaluation.infill_span_length
    wanted = recipe.evaluation.num_infill_examples
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    eos = dataset.vocabulary.eos
    tokens = np.full(2 * wanted * length, eos + 1, np.int32)

    def describe(piece: int) -> str | None:
        changed = tokens.copy()
        changed[::piece] = eos
        prefix = tmp_path / f"held_out_{piece}"
        with TokenWriter(prefix, dataset.vocabulary.size) as writer:
            writer.append(changed)
            writer.end_document()
        return describe_small_split(recipe, replace(dataset, held_out=TokenStore.open(prefix)))

    assert describe(10**9) is None
    warning = describe(length)
    assert warning is not None
    assert f"and 0 examples of infilling of {length} tokens within one document" in warning


def test_split_that_nothing_can_be_measured_by_is_refused_for_a_new_run(tmp_path: Path) -> None:
    """Before the run, not in the comparison after it."""
    recipe = tiny_recipe(tmp_path)
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    row = recipe.objective.max_raw_length

    def cut(num_tokens: int) -> TokenDataset:
        prefix = tmp_path / f"held_out_{num_tokens}"
        with TokenWriter(prefix, dataset.vocabulary.size) as writer:
            writer.append(np.full(num_tokens, dataset.vocabulary.eos + 1, np.int32))
            writer.end_document()
        return replace(dataset, held_out=TokenStore.open(prefix))

    check_run(recipe, cut(2 * row), None)
    with pytest.raises(CorpusError, match=r"are 1 rows of .*fewer than 2 cannot be measured"):
        check_run(recipe, cut(2 * row - 1), None)
