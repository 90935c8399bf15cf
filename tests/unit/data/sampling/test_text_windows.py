"""Windows of text by sample index: each window once per epoch, shuffled, without a table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul2r.data.sampling.text_windows import (
    DOCUMENTS_PER_BLOCK,
    DOCUMENTS_PER_READ,
    DocumentWindows,
    TextWindows,
)
from ul2r.errors import CorpusError
from ul2r.objective.random_kernels import SHUFFLE_ROUNDS, permute

seeds = st.integers(0, 2**63 - 1)
keys = st.lists(st.integers(0, 2**64 - 1), min_size=SHUFFLE_ROUNDS, max_size=SHUFFLE_ROUNDS)


class CountingStore:
    """A store whose tokens are their own positions, modulo 2**31."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read_tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        positions = [(start + offset) % self.size % 2**31 for offset in range(length)]
        return np.array(positions, np.int32)


def permuted(place: int, size: int, round_keys: list[int]) -> int:
    return int(permute(np.uint64(place), np.uint64(size), np.array(round_keys, np.uint64)))


def read(windows: TextWindows, sample: int, length: int) -> list[int]:
    out = np.full((1, length + 1), -1, np.int32)
    windows.read(np.array([sample]), np.array([length]), out)
    found: list[int] = out[0].tolist()
    assert found.pop() == -1, "nothing is written beyond the requested length"
    return found


@given(st.integers(1, 700), keys)
def test_permutation_is_a_bijection(size: int, round_keys: list[int]) -> None:
    assert sorted(permuted(place, size, round_keys) for place in range(size)) == list(range(size))


@given(st.integers(1, 2**40), keys, st.data())
def test_permutation_stays_within_sets_of_any_size(
    size: int, round_keys: list[int], data: st.DataObject
) -> None:
    assert 0 <= permuted(data.draw(st.integers(0, size - 1)), size, round_keys) < size


@given(st.integers(20, 3000), st.integers(1, 20), seeds, st.integers(0, 5))
def test_epoch_reads_each_window_once_without_overlap(
    size: int, length: int, seed: int, epoch: int
) -> None:
    windows = TextWindows(CountingStore(size), length, seed)
    count = size // length
    assert len(windows) == count
    samples = range(epoch * count, (epoch + 1) * count)
    found = [token for sample in samples for token in read(windows, sample, length)]
    assert len(found) == len(set(found)) == count * length


@given(st.integers(20, 3000), st.integers(2, 20), seeds, st.integers(0, 10_000), st.data())
def test_window_is_contiguous_from_its_start(
    size: int, length: int, seed: int, sample: int, data: st.DataObject
) -> None:
    windows = TextWindows(CountingStore(size), length, seed)
    requested = data.draw(st.integers(1, length))
    (start,) = windows.starts(np.array([sample])).tolist()
    expected = [(start + offset) % size for offset in range(requested)]
    assert read(windows, sample, requested) == expected


def test_tokens_left_out_differ_between_epochs() -> None:
    windows = TextWindows(CountingStore(109), 10, seed=1)
    left_out = set()
    for epoch in range(12):
        samples = range(epoch * 10, epoch * 10 + 10)
        found = {token for sample in samples for token in read(windows, sample, 10)}
        assert len(found) == 100
        left_out.add(frozenset(range(109)) - found)
    assert len(left_out) > 6


def test_order_differs_between_seeds_and_epochs() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        windows = TextWindows(CountingStore(640), 10, seed)
        starts = windows.starts(np.arange(epoch * 64, epoch * 64 + 64))
        return tuple(np.argsort(np.argsort((starts - starts[0]) % 640)))

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(64)) not in orders


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_each_position_is_equally_likely_for_a_window(size: int) -> None:
    # 99.9 % quantiles of chi-squared with size - 1 degrees of freedom.
    quantile = {2: 10.83, 3: 13.82, 5: 18.47, 12: 31.26}[size]
    counts: Counter[int] = Counter()
    for seed in range(3000):
        generator = np.random.Generator(np.random.PCG64(seed))
        counts[permuted(1, size, generator.integers(2**63, size=SHUFFLE_ROUNDS).tolist())] += 1
    expected = 3000 / size
    assert sum((counts[p] - expected) ** 2 / expected for p in range(size)) < quantile


def test_shifts_are_spread_over_the_store() -> None:
    starts = [
        int(TextWindows(CountingStore(1000), 1000, seed).starts(np.zeros(1, np.int64))[0])
        for seed in range(400)
    ]
    assert max(Counter(start // 100 for start in starts).values()) < 75, "40 expected in each tenth"
    assert len({start // 100 for start in starts}) == 10


def test_huge_store_needs_no_table() -> None:
    windows = TextWindows(CountingStore(2**50), 2049, seed=1)
    assert len(set(read(windows, 10**15, 2049))) == 2049


def test_store_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(CorpusError) as caught:
        TextWindows(CountingStore(500), 1025, seed=1, split="held-out")
    assert str(caught.value) == (
        "the held-out split has 500 tokens, one window needs 1025: add text, "
        "lower objective.sequence_length or raise objective.slots_per_row"
    )


class CountingDocuments(CountingStore):
    """A counting store with documents of the given sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sum(sizes))
        self.sizes = sizes

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *self.sizes])[first : end + 1]

    @property
    def num_documents(self) -> int:
        return len(self.sizes)

    def read_document(self, number: int) -> npt.NDArray[np.int32]:
        begin, end = self.document_bounds(number, number + 1).tolist()
        return self.read_tokens(begin, end - begin)


document_sizes = st.lists(st.integers(0, 90), min_size=1, max_size=30).filter(
    lambda sizes: max(sizes) >= 4
)


def read_texts(windows: DocumentWindows, samples: range) -> list[list[int]]:
    lengths = np.full(len(samples), windows.length)
    out = np.full((len(samples), windows.length), -1, np.int32)
    windows.read(np.array(samples), lengths, out)
    return [line[:length].tolist() for line, length in zip(out, lengths, strict=True)]


@given(document_sizes, st.integers(8, 40), seeds, st.integers(0, 3))
def test_epoch_reads_every_token_of_long_enough_documents_once(
    sizes: list[int], length: int, seed: int, epoch: int
) -> None:
    windows = DocumentWindows(CountingDocuments(sizes), length, seed)
    count = len(windows)
    texts = read_texts(windows, range(epoch * count, (epoch + 1) * count))
    begins = np.cumsum([0, *sizes]).tolist()
    expected = {
        token
        for begin, size in zip(begins, sizes, strict=False)
        if size >= 4
        for token in range(begin, begin + size)
    }
    assert sorted(token for text in texts for token in text) == sorted(expected)


@given(document_sizes, st.integers(8, 40), seeds)
def test_windows_stay_within_a_document_and_have_nearly_equal_lengths(
    sizes: list[int], length: int, seed: int
) -> None:
    windows = DocumentWindows(CountingDocuments(sizes), length, seed)
    begins = np.cumsum([0, *sizes])
    found: dict[int, list[int]] = {}
    for window in read_texts(windows, range(len(windows))):
        assert window == list(range(window[0], window[0] + len(window)))
        (document,) = set((np.searchsorted(begins, window, side="right") - 1).tolist())
        found.setdefault(document, []).append(len(window))
    for document, lengths in found.items():
        assert len(lengths) == -(-sizes[document] // length)
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) <= length


class EqualDocuments(CountingDocuments):
    """Documents of one size, however many, that record how many of them are asked for at a time."""

    def __init__(self, num_documents: int, size: int) -> None:
        CountingStore.__init__(self, num_documents * size)
        self.document_size = size
        self.asked: list[int] = []

    @property
    def num_documents(self) -> int:
        return len(self) // self.document_size

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        self.asked.append(end - first)
        return np.arange(first, end + 1) * self.document_size


def test_window_of_ten_million_documents_is_looked_up() -> None:
    store = EqualDocuments(10**7 + 3, 12)
    windows = DocumentWindows(store, 10, seed=1)
    assert len(windows) == 2 * store.num_documents
    assert max(store.asked) == DOCUMENTS_PER_READ, "counted without an array of all documents"

    store.asked.clear()
    texts = read_texts(windows, range(64))
    assert sum(store.asked) <= 64 * DOCUMENTS_PER_BLOCK
    assert all(len(text) == 6 and text[0] % 6 == 0 for text in texts)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 9), min_size=500, max_size=900), seeds)
def test_epoch_of_several_blocks_of_documents_reads_every_token_once(
    sizes: list[int], seed: int
) -> None:
    # Long runs of documents without a window, which fill blocks.
    sizes = [*sizes, *[3] * 2 * DOCUMENTS_PER_BLOCK, 50]
    windows = DocumentWindows(CountingDocuments(sizes), 8, seed)
    texts = read_texts(windows, range(len(windows)))
    assert sum(map(len, texts)) == len({token for text in texts for token in text})
    assert sum(map(len, texts)) == sum(size for size in sizes if size >= 4)


def test_document_windows_are_shuffled_differently_in_each_epoch() -> None:
    windows = DocumentWindows(CountingDocuments([50] * 40), 10, seed=1)
    orders = {
        tuple(window[0] for window in read_texts(windows, range(k * 200, k * 200 + 200)))
        for k in range(5)
    }
    assert len(orders) == 5


def test_requested_length_is_not_exceeded_and_sample_minus_one_reads_nothing() -> None:
    windows = DocumentWindows(CountingDocuments([30, 6]), 10, seed=1)
    lengths = np.array([4, 0, 4])
    out = np.full((3, 10), -1, np.int32)
    windows.read(np.array([0, -1, 1]), lengths, out)
    assert lengths.tolist() == [4, 0, 4]
    assert ((out >= 0).sum(axis=1) == lengths).all()


def test_store_of_short_documents_is_refused() -> None:
    with pytest.raises(CorpusError, match="the train split has no document of 4 tokens or more"):
        DocumentWindows(CountingDocuments([3, 2, 0]), 10, seed=1)
