"""The held-out split by tokens: in proportion, capped, and never also in training."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul2r.data.prepare.held_out import ALL_TOKENS, MIN_PIECE_TOKENS, HeldOutSplit, choose_held_out
from ul2r.data.prepare.merge import HeldOutLimits, merge_first_segment, merge_next_segment
from ul2r.data.prepare.shards import FileGroup, write_shard
from ul2r.data.prepare.source_files import find_files
from ul2r.data.store.token_store import TokenStore
from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.errors import CorpusError
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


def count_windows(held_out: list[int], length: int = 131) -> int:
    """Return the windows within one document, by default those of infilling; an eos ends each."""
    return sum((n - 1) // length for n in held_out if n)


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
    cut = [n for n, size in zip(held_out, sizes, strict=True) if 0 < n < size]
    assert len(cut) == 1 or all(n >= MIN_PIECE_TOKENS for n in cut)


@given(
    st.lists(st.integers(200, 50_000), min_size=1, max_size=60),
    st.integers(1000, 10**6),
    st.integers(0, 9),
)
def test_held_out_text_holds_windows(sizes: list[int], max_tokens: int, seed: int) -> None:
    held_out = hold_out(sizes, 0.1, max_tokens, seed)
    budget = min(0.1 * sum(sizes), max_tokens)
    if max(sizes) > budget + 2 > 300:
        # It fits into one document: at least half of it is text to measure on.
        assert count_windows(held_out) >= budget / 2 // 256
    assert all(n > 131 for n in held_out if n) or budget < 200


@pytest.mark.parametrize(
    ("number", "size", "num_whole", "num_windows"),
    [(100, 1000, 3, 21), (40, 2000, 1, 15), (1000, 1000, 30, 210), (200, 20_000, 6, 912)],
)
def test_similar_documents_are_held_out_as_wholes_and_hold_windows(
    number: int, size: int, num_whole: int, num_windows: int
) -> None:
    held_out = hold_out([size] * number, 0.03)
    assert sorted(held_out) == [0] * (number - num_whole) + [size] * num_whole
    assert count_windows(held_out) == num_windows


def test_documents_longer_than_the_budget_contribute_one_piece() -> None:
    held_out = hold_out([1000] * 20, 0.03)
    assert sorted(held_out) == [0] * 19 + [600]
    assert hold_out([20_000], 0.03) == [600]
    # Not many texts that are shorter than a window instead.
    assert hold_out([*[30] * 100, *[1000] * 10], 0.03) == hold_out(
        [*[30] * 100, *[1000] * 10], 0.03, max_tokens=390
    )
    assert sorted(hold_out([*[30] * 100, *[1000] * 10], 0.03))[-2:] == [0, 390]


def test_short_texts_are_held_out_although_one_is_long() -> None:
    held_out = hold_out([*[30] * 100_000, 5000], 0.03)
    assert sum(held_out) == pytest.approx(0.03 * 3_005_000, abs=30)


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


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(1000, [1000]), (999, [998]), (1999, [1000]), (300, [300])]
)
def test_cap_near_a_document_s_size_leaves_text_to_measure_on(
    max_tokens: int, expected: list[int]
) -> None:
    held_out = hold_out([1000] * 10_000, 0.03, max_tokens)
    assert [n for n in held_out if n] == expected


def test_texts_with_too_many_copies_are_left_to_training() -> None:
    keys = np.array([7] * 900 + list(range(100, 1100)), np.uint64)
    sizes = np.full(1900, 100)
    split = choose_held_out(keys, sizes, 0.1, NO_CAP)
    held_out = split.count(keys, sizes)
    assert not held_out[:900].any()
    assert set(held_out[900:].tolist()) == {0, 100}
    assert held_out.sum() == 19_000


def test_copies_do_not_break_the_cap() -> None:
    keys = np.full(1000, 7, np.uint64)
    sizes = np.full(1000, 10)
    # The least that can be held out of each, as they must be on one side.
    assert choose_held_out(keys, sizes, 0.03, 2000).tokens.tolist() == [2]
    with pytest.raises(CorpusError, match=r"has 1,000 documents, 1 of them different, the longest"):
        choose_held_out(keys, sizes, 0.03, 1999)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=2, max_size=80))
def test_whole_documents_are_those_of_the_smallest_keys_that_fit(
    documents: list[tuple[int, int]],
) -> None:
    # Sizes follow from the keys, as those of copies do.
    keys = np.array([2**57 * number for number, _ in documents], np.uint64)
    sizes = np.array([300 + 7 * (number % 11) for number, _ in documents])
    counts = Counter(zip(keys.tolist(), sizes.tolist(), strict=True))
    limit = math.floor(0.4 * int(sizes.sum()))
    expected = {}
    for (key, size), number in sorted(counts.items()):
        if size * number <= limit:
            expected[key] = size
            limit -= size * number
    split = choose_held_out(keys, sizes, 0.4, NO_CAP)
    if expected and sum(n for key, n in expected.items()) * 2 >= 0.4 * sizes.sum():
        assert dict(zip(split.keys.tolist(), split.tokens.tolist(), strict=True)) == expected


def test_memory_is_a_fraction_of_the_documents() -> None:
    number = 10**6
    keys = np.random.default_rng(0).integers(0, 2**64, number, np.uint64)
    sizes = np.full(number, 1000)
    tracemalloc.start()
    try:
        choose_held_out(keys, sizes, 0.03, NO_CAP)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * number, "bytes"


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
    assert held_out.num_documents == 1
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
