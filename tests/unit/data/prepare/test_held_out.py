"""The held-out split by tokens: in proportion, capped, and never also in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.data.prepare.held_out import ALL_TOKENS, HeldOutSplit, choose_held_out
from ul2r.data.prepare.merge import HeldOutLimits, merge_first_segment, merge_next_segment
from ul2r.data.prepare.shards import FileGroup, write_shard
from ul2r.data.prepare.source_files import find_files
from ul2r.data.store.token_store import TokenStore
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.testing.corpus import write_texts

NO_CAP = 2**62


def hold_out(
    sizes: list[int], fraction: float, max_tokens: int = NO_CAP, seed: int = 0
) -> list[int]:
    """Return the tokens held out of documents of random keys."""
    keys = np.random.default_rng(seed).integers(0, 2**64, len(sizes), np.uint64)
    array = np.array(sizes)
    split = choose_held_out(keys, array, fraction, max_tokens)
    held_out: list[int] = split.count(keys, array).tolist()
    return held_out


@given(
    st.lists(st.integers(4, 10**6), min_size=1, max_size=60),
    st.floats(0.001, 0.499),
    st.integers(1, 10**6),
    st.integers(0, 9),
)
def test_no_more_than_the_budget_is_held_out_and_something_is(
    sizes: list[int], fraction: float, max_tokens: int, seed: int
) -> None:
    held_out = hold_out(sizes, fraction, max_tokens, seed)
    budget = min(fraction * sum(sizes), max_tokens)
    assert 2 <= sum(held_out) <= max(budget, 2)
    # A part on either side is a text and an eos.
    assert all(
        n in {0, size} or 2 <= n <= size - 2 for n, size in zip(held_out, sizes, strict=True)
    )
    assert any(n < size for n, size in zip(held_out, sizes, strict=True)), (
        "there is text to train on"
    )


def test_long_documents_contribute_in_proportion() -> None:
    assert hold_out([100_000, 40_000], 0.03) == [3000, 1200]
    assert hold_out([100_000] * 10, 0.03) == [3000] * 10


def test_many_documents_are_held_out_as_wholes() -> None:
    held_out = hold_out([100] * 10_000, 0.03)
    assert set(held_out) == {0, 100}
    assert held_out.count(100) == 300


def test_books_beside_many_short_texts_have_their_share() -> None:
    sizes = [10_000_000, 5_000_000, *[100] * 100_000]
    held_out = hold_out(sizes, 0.03)
    assert held_out[:2] == [300_000, 150_000]
    assert sum(held_out[2:]) == pytest.approx(0.03 * 100 * 100_000, rel=0.01)


def test_split_is_capped() -> None:
    held_out = hold_out([10**9] * 1000, 0.03, max_tokens=2**24)
    assert 0.99 * 2**24 < sum(held_out) <= 2**24
    assert set(held_out) == {2**24 // 1000}, "every source contributes"


def test_frequent_copies_are_cut_instead_of_filling_the_split() -> None:
    keys = np.array([7] * 900 + list(range(100, 1100)), np.uint64)
    sizes = np.full(1900, 100)
    split = choose_held_out(keys, sizes, 0.1, NO_CAP)
    held_out = split.count(keys, sizes)
    assert set(held_out[:900].tolist()) == {10}
    assert set(held_out[900:].tolist()) == {0, 100}


@pytest.mark.parametrize("is_old", [False, True])
def test_later_segments_leave_out_what_is_held_out(tmp_path: Path, is_old: bool) -> None:
    tokenizer = train_tokenizer(["The river sees the sea. Every child follows snow!\n"], 330, 8)
    vocabulary = build_vocabulary(tokenizer)
    write_texts(tmp_path / "texts", num_documents=3)
    files = tuple(find_files([str(tmp_path / "texts")]))
    # Both segments have the same documents.
    for number in range(2):
        write_shard(FileGroup(number, files), tmp_path, tokenizer, vocabulary)
    limits = HeldOutLimits(0.2, NO_CAP)
    first, held_out = merge_first_segment(tmp_path, [0], tmp_path / "train_00", limits, vocabulary)
    assert held_out.num_documents == 3
    if is_old:
        # As an older version wrote it, which held out whole documents.
        keys = HeldOutSplit.load(tmp_path / "held_out.npy").keys
        np.save(tmp_path / "held_out.npy", keys[:1])
        assert HeldOutSplit.load(tmp_path / "held_out.npy").tokens.tolist() == [ALL_TOKENS]

    second = merge_next_segment(tmp_path, [1], tmp_path / "train_01", vocabulary)
    if is_old:
        assert second.num_documents == 2
        return
    assert second == first
    texts, again = (TokenStore.open(tmp_path / f"train_0{number}") for number in range(2))
    for number in range(3):
        assert again.read_document(number).tolist() == texts.read_document(number).tolist()
