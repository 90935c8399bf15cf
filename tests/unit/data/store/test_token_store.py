"""Token stores, checked against Megatron-Core's own reader and writer of the format."""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from ul2r.data.store.dataset import open_dataset
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.testing.corpus import make_tiny_store

DOCUMENTS = [[[5, 6, 7], [8]], [[200]], [[1, 2], [3, 4, 5], [6]]]
"""Documents of one or several sequences each."""


def write_with_megatron(folder: Path, dtype: type[np.integer[Any]] = np.int32) -> Path:
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=dtype)
    for document in DOCUMENTS:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(folder / "corpus.idx"))
    return folder / "corpus"


def write_store(folder: Path, vocabulary_size: int = 1000) -> Path:
    with TokenWriter(folder / "own", vocabulary_size) as writer:
        for document in DOCUMENTS:
            for sequence in document:
                writer.append(sequence)
            writer.end_document()
    return folder / "own"


def flatten(document: list[list[int]]) -> list[int]:
    return [token for sequence in document for token in sequence]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_reads_a_store_written_by_megatron(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    store = TokenStore.open(write_with_megatron(tmp_path, dtype))
    assert [store.read_document(n).tolist() for n in range(store.num_documents)] == [
        flatten(document) for document in DOCUMENTS
    ]
    assert store.read_document(0).dtype == np.int32
    assert len(store) == 11


@pytest.mark.parametrize(("size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_megatron_reads_our_store(tmp_path: Path, size: int, dtype: type[np.integer[Any]]) -> None:
    theirs = IndexedDataset(str(write_store(tmp_path, size)))
    assert [theirs[n].tolist() for n in range(len(theirs))] == [flatten(d) for d in DOCUMENTS]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    assert theirs.index.dtype == dtype


def test_first_token_follows_the_last(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path))
    tokens = [token for document in DOCUMENTS for token in flatten(document)]
    assert store.read_tokens(2, 5).tolist() == tokens[2:7]
    assert store.read_tokens(9, 25).tolist() == (tokens * 4)[9:34]
    assert store.read_tokens(11 * 7 + 3, 4).tolist() == tokens[3:7]


def test_read_tokens_returns_a_copy(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path))
    store.read_tokens(0, 3)[:] = 0
    assert store.read_tokens(0, 3).tolist() == [5, 6, 7]


def test_document_numbers_out_of_range_raise(tmp_path: Path) -> None:
    store = TokenStore.open(write_store(tmp_path))
    for number in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            store.read_document(number)


def test_store_pickles_as_its_path(tmp_path: Path) -> None:
    pickled = pickle.dumps(TokenStore.open(write_store(tmp_path)))
    assert len(pickled) < 500
    assert pickle.loads(pickled).read_document(1).tolist() == [200]


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    with (
        pytest.raises(CorpusError, match="the vocabulary has 1000"),
        TokenWriter(tmp_path / "own", vocabulary_size=1000) as writer,
    ):
        writer.append([1, 2, 1000])
    assert list(tmp_path.iterdir()) == []


def test_missing_bin_file_is_refused(tmp_path: Path) -> None:
    prefix = write_store(tmp_path)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(CorpusError, match=r"own\.bin: missing"):
        TokenStore.open(prefix)


def test_truncated_bin_file_is_refused(tmp_path: Path) -> None:
    data = write_store(tmp_path).with_suffix(".bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(CorpusError, match=r"own\.bin: has 20 bytes, but own\.idx describes 22"):
        TokenStore.open(tmp_path / "own")


def test_truncated_index_is_refused(tmp_path: Path) -> None:
    index = write_store(tmp_path).with_suffix(".idx")
    whole = index.read_bytes()
    reasons = {len(whole) - 1: "the file is truncated", 20: "not an index", 0: "not an index"}
    for size, reason in reasons.items():
        index.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=reason):
            TokenStore.open(tmp_path / "own")


@pytest.mark.parametrize("sequence", [-1, 99, 2**62])
def test_document_outside_the_index_is_refused(tmp_path: Path, sequence: int) -> None:
    index = write_store(tmp_path).with_suffix(".idx")
    whole = index.read_bytes()
    # The document table is last: the beginning of the second document is two entries before its end.
    index.write_bytes(whole[:-16] + struct.pack("<q", sequence) + whole[-8:])
    store = TokenStore.open(tmp_path / "own")
    with pytest.raises(CorpusError, match=r"own\.idx: document \d has tokens .* index is damaged"):
        store.read_document(store.num_documents - 1)


def test_index_of_floats_and_other_files_are_refused(tmp_path: Path) -> None:
    index = write_store(tmp_path).with_suffix(".idx")
    whole = index.read_bytes()
    float32 = 7
    index.write_bytes(whole[:17] + struct.pack("<B", float32) + whole[18:])
    with pytest.raises(CorpusError, match="with token type 7 is not supported"):
        TokenStore.open(tmp_path / "own")

    index.write_bytes(b"x" * len(whole))
    with pytest.raises(CorpusError, match="not an index of Megatron's"):
        TokenStore.open(tmp_path / "own")


def test_swapped_bin_and_idx_files_are_refused(tmp_path: Path) -> None:
    prefix = write_store(tmp_path)
    data = prefix.with_suffix(".bin")
    index = prefix.with_suffix(".idx")
    data.rename(tmp_path / "temporary")
    index.rename(data)
    (tmp_path / "temporary").rename(index)
    with pytest.raises(CorpusError, match=r"own\.idx: not an index of Megatron's"):
        TokenStore.open(prefix)


def test_bin_file_of_another_store_is_refused(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store")
    held_out = (tmp_path / "store" / "held_out.bin").read_bytes()
    (tmp_path / "store" / "train.bin").write_bytes(held_out)
    message = rf"train\.bin: has {len(held_out)} bytes, .* describes {2 * dataset.manifest.train.num_tokens}"
    with pytest.raises(CorpusError, match=message):
        open_dataset(tmp_path / "store")


@pytest.mark.parametrize("start", [24, 2**40, -2])
def test_document_outside_the_tokens_is_refused(tmp_path: Path, start: int) -> None:
    # `start` is the byte at which the second document begins; the .bin file has 22 bytes.
    index = write_store(tmp_path).with_suffix(".idx")
    whole = index.read_bytes()
    pointers_at = 34 + 4 * 3  # after Megatron's header and three lengths of 32 bits
    pointer = struct.pack("<q", start)
    index.write_bytes(whole[: pointers_at + 8] + pointer + whole[pointers_at + 16 :])

    store = TokenStore.open(tmp_path / "own")
    for number in (0, 1):
        with pytest.raises(CorpusError, match=rf"own\.idx: document {number} has tokens .* of 11"):
            store.read_document(number)


def test_replaced_store_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    first = make_tiny_store(tmp_path / "store").manifest.fingerprint
    assert open_dataset(tmp_path / "store", first).manifest.fingerprint == first

    shutil.rmtree(tmp_path / "store")
    second = make_tiny_store(tmp_path / "store", seed=1).manifest.fingerprint
    message = f"replaced .*fingerprint {first[:8]} before, {second[:8]} now"
    with pytest.raises(CorpusError, match=message):
        open_dataset(tmp_path / "store", first)


def test_store_without_tokens_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "own", vocabulary_size=1000):
        pass
    with pytest.raises(CorpusError, match="contains no tokens"):
        TokenStore.open(tmp_path / "own")


def test_dataset_opens_with_its_counts_and_vocabulary(tmp_path: Path) -> None:
    made = make_tiny_store(tmp_path / "store")
    dataset = open_dataset(tmp_path / "store")
    assert dataset.manifest == made.manifest
    assert (len(dataset.train[0].store), dataset.train[0].store.num_documents) == (
        dataset.manifest.train.num_tokens,
        dataset.manifest.train.num_documents,
    )
    assert dataset.vocabulary.size == 512
    assert len(dataset.vocabulary.sentinels) == 64


def test_equal_stores_have_equal_fingerprints(tmp_path: Path) -> None:
    first = make_tiny_store(tmp_path / "first").manifest
    again = make_tiny_store(tmp_path / "again").manifest
    other = make_tiny_store(tmp_path / "other", seed=1).manifest
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_missing_store_names_the_job_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"run `ul2r prepare RECIPE` first"):
        open_dataset(tmp_path / "store")


def test_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="not a token store"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "held_out.idx", "tokenizer.json"])
def test_store_with_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    make_tiny_store(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorpusError, match=f"{name}: .*missing"):
        open_dataset(tmp_path)


def test_tokenizer_of_another_store_is_refused(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "a")
    make_tiny_store(tmp_path / "b", seed=1)
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    with pytest.raises(CorpusError, match=r"tokenizer\.json: missing, or not the tokenizer"):
        open_dataset(tmp_path / "a")
