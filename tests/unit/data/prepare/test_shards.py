"""Shards and their merge: each document once, and the same store however the files were grouped."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from ul2r.data.prepare.merge import HeldOutLimits, merge_shards
from ul2r.data.prepare.shards import (
    MAX_SHARD_BYTES,
    MIN_SHARD_BYTES,
    FileGroup,
    group_files,
    is_shard_done,
    load_left_out,
    write_shard,
)
from ul2r.data.prepare.source_files import SourceFile, find_files
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.token_source import DocumentSource
from ul2r.data.tokenizer import add_special_tokens, build_vocabulary, encode, train_tokenizer
from ul2r.errors import CorpusError
from ul2r.testing.corpus import write_texts
from ul2r.testing.tokenizers import KINDS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The river sees the sea. Every child follows snow!\n"], 330, 8)


def make_store(
    folder: Path, groups: list[FileGroup], tokenizer: Tokenizer, held_out_fraction: float = 0.25
) -> TokenDataset:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = build_vocabulary(tokenizer)
    # In reverse: shards can be made in any order.
    for group in reversed(groups):
        write_shard(group, folder, tokenizer, vocabulary)
    limits = HeldOutLimits(held_out_fraction, 2**24)
    merge_shards(folder, len(groups), limits, vocabulary, {"made": "here"})
    return open_dataset(folder)


def decode_documents(store: DocumentSource, tokenizer: Tokenizer) -> list[str]:
    documents = [store.read_document(n).tolist() for n in range(store.num_documents)]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents]


def make_file(size: int) -> SourceFile:
    return SourceFile(Path("a.jsonl"), "a.jsonl", size, 0)


@pytest.mark.parametrize("kind", ["Llama 2", "byte-level"])
def test_a_document_of_several_chunks_is_tokenized_as_a_whole(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    add_special_tokens(tokenizer, num_sentinels=2)
    long = "class Sea:\n    def area(self):\n        return self.depth\n" * 2500
    texts = {"a": "a short one", "b": long, "c": "def f(x): return x", "d": long + "end"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)

    group = FileGroup(0, tuple(find_files([str(tmp_path)])))
    dataset = make_store(tmp_path / "store", [group], tokenizer)

    train, held_out = (
        [tuple(store.read_document(number).tolist()) for number in range(store.num_documents)]
        for store in (dataset.train[0].store, dataset.held_out)
    )
    # The end of a long document is held out, and its beginning has an eos of its own.
    joined = [(*head[:-1], *tail) for head in train for tail in held_out]
    stored = {*train, *held_out, *joined}
    for name, text in texts.items():
        # A difference would be shown as a hundred thousand numbers.
        is_whole = (*encode(tokenizer, text).tolist(), dataset.vocabulary.eos) in stored
        assert is_whole, name


def test_every_document_is_whole_and_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = write_texts(tmp_path / "texts", num_documents=40, num_sentences=3)
    dataset = make_store(
        tmp_path / "store", group_files(find_files([str(tmp_path / "texts")])), tokenizer
    )
    train, held_out = (
        decode_documents(dataset.train[0].store, tokenizer),
        decode_documents(dataset.held_out, tokenizer),
    )
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(f"{text}<eos>" for text in texts)
    kept = [f"{text}<eos>" for text in texts if f"{text}<eos>" in set(train)]
    assert train == kept, "training documents keep the order of the files"


def test_manifest_counts_match_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = write_texts(tmp_path / "texts", num_documents=12, num_sentences=3)
    dataset = make_store(
        tmp_path / "store", group_files(find_files([str(tmp_path / "texts")])), tokenizer
    )
    train, held_out = dataset.manifest.train, dataset.manifest.held_out
    assert (train.num_documents, held_out.num_documents) == (
        dataset.train[0].store.num_documents,
        dataset.held_out.num_documents,
    )
    assert (train.num_tokens, held_out.num_tokens) == (
        len(dataset.train[0].store),
        len(dataset.held_out),
    )
    assert train.text_bytes + held_out.text_bytes == sum(len(text.encode()) for text in texts)


def test_store_does_not_depend_on_the_groups(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_texts(tmp_path / "texts", num_documents=10, num_sentences=3)
    files = find_files([str(tmp_path / "texts")])
    all_edges = [[0, 10], [0, 1, 4, 10], list(range(11))]
    manifests = [
        make_store(
            tmp_path / f"store{len(edges)}",
            [
                FileGroup(number, tuple(files[start:end]))
                for number, (start, end) in enumerate(pairwise(edges))
            ],
            tokenizer,
        ).manifest
        for edges in all_edges
    ]
    assert manifests[0] == manifests[1] == manifests[2]


def test_adding_documents_moves_few_others_to_the_other_side(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    sides = []
    for num_documents in (400, 440):
        folder = tmp_path / str(num_documents)
        write_texts(folder / "texts", num_documents, num_sentences=1)
        dataset = make_store(
            folder / "store", group_files(find_files([str(folder / "texts")])), tokenizer
        )
        sides.append(set(decode_documents(dataset.held_out, tokenizer)))
    assert len(sides[0] - sides[1]) <= 10, "only documents near the limit change sides"


def test_equal_documents_are_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = tmp_path / "texts"
    write_texts(texts, num_documents=40, num_sentences=3)
    for path in list(texts.iterdir()):
        (texts / f"copy_{path.name}").write_bytes(path.read_bytes())
    dataset = make_store(tmp_path / "store", group_files(find_files([str(texts)])), tokenizer, 0.3)
    train, held_out = (
        decode_documents(dataset.train[0].store, tokenizer),
        decode_documents(dataset.held_out, tokenizer),
    )
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 80


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.499])
def test_two_long_texts_both_train_and_are_both_held_out(
    tmp_path: Path, tokenizer: Tokenizer, fraction: float
) -> None:
    lengths = {"a": 3000, "b": 900}
    for name, num_lines in lengths.items():
        text = "".join(f"line {number} of {name}\n" for number in range(num_lines))
        (tmp_path / f"{name}.txt").write_text(text)
    files = find_files([str(tmp_path / f"{name}.txt") for name in lengths])
    dataset = make_store(tmp_path / "store", group_files(files), tokenizer, fraction)
    texts = decode_documents(dataset.train[0].store, tokenizer)
    ends = decode_documents(dataset.held_out, tokenizer)

    assert len(texts) == len(ends) == 2
    for text, end, file in zip(texts, ends, files, strict=True):
        # In one piece, and nowhere else.
        assert text.removesuffix("<eos>") + end.removesuffix("<eos>") == file.path.read_text()
        assert len(end) / len(text + end) == pytest.approx(fraction, rel=0.05)


def test_held_out_text_of_one_file_is_in_one_piece(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"line {number} of a long book\n" for number in range(12_000))
    (tmp_path / "book.txt").write_text(text)
    groups = group_files(find_files([str(tmp_path / "book.txt")]))
    dataset = make_store(tmp_path / "store", groups, tokenizer, 0.03)
    (end,) = decode_documents(dataset.held_out, tokenizer)
    assert text.endswith(end.removesuffix("<eos>"))
    assert len(dataset.held_out) == pytest.approx(0.03 * len(dataset.train[0].store), rel=0.04)


def test_very_long_text_is_split_at_line_breaks(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ul2r.data.prepare.shards.MAX_WHOLE_DOCUMENT_BYTES", 2**17)
    text = "".join(f"line {number} of a long book\n" for number in range(12_000))
    (tmp_path / "book.txt").write_text(text)
    groups = group_files(find_files([str(tmp_path / "book.txt")]))
    dataset = make_store(tmp_path / "store", groups, tokenizer)
    parts = decode_documents(dataset.train[0].store, tokenizer)
    assert len(parts) > 3
    ends = decode_documents(dataset.held_out, tokenizer)
    assert len("".join(parts + ends).replace("<eos>", "")) == len(text)


def test_copies_of_one_long_text_are_cut_at_the_same_place(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for number in range(3):
        write_texts(tmp_path / str(number), num_documents=1)
    dataset = make_store(tmp_path / "store", group_files(find_files([str(tmp_path)])), tokenizer)
    for store in (dataset.train[0].store, dataset.held_out):
        assert len(set(decode_documents(store, tokenizer))) == 1
        assert store.num_documents == 3


@pytest.mark.parametrize("count", [1, 3])
def test_corpus_too_short_to_divide_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, count: int
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text("so")
    with pytest.raises(
        CorpusError, match=r"1 of them different, the longest of 3 tokens, of which noth"
    ):
        make_store(tmp_path / "store", group_files(find_files([str(tmp_path)])), tokenizer)


def test_corpus_without_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(CorpusError, match="the corpus has no text"):
        make_store(tmp_path / "store", group_files(find_files([str(tmp_path)])), tokenizer)


def test_shard_is_done_only_when_completely_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    good, bad = find_files([str(tmp_path)])
    folder = tmp_path / "store"
    folder.mkdir()
    with pytest.raises(CorpusError, match=r"b\.txt: line 1"):
        write_shard(FileGroup(0, (good, bad)), folder, tokenizer, build_vocabulary(tokenizer))
    assert not is_shard_done(FileGroup(0, (good, bad)), folder)
    assert list(folder.iterdir()) == []

    write_shard(FileGroup(0, (good,)), folder, tokenizer, build_vocabulary(tokenizer))
    assert is_shard_done(FileGroup(0, (good,)), folder)


def test_shards_are_removed_after_the_merge(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_texts(tmp_path / "texts", num_documents=4)
    make_store(tmp_path / "store", group_files(find_files([str(tmp_path / "texts")])), tokenizer)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        *Manifest.read(tmp_path / "store").files,
        "manifest.json",
    }


def test_shard_counts_what_it_leaves_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n{"text": ""}\n{"text": null}\n')
    (tmp_path / "b.txt").touch()
    files = find_files([str(tmp_path)], null_text="skip")
    vocabulary = build_vocabulary(tokenizer)
    write_shard(FileGroup(0, (files[0],)), tmp_path, tokenizer, vocabulary)
    write_shard(FileGroup(1, (files[1],)), tmp_path, tokenizer, vocabulary)

    left_out = load_left_out(tmp_path, [0, 1])
    assert {reason: count.count for reason, count in left_out.counts.items()} == {
        "empty documents": 2,
        "records without text": 1,
    }
    (tmp_path / "shard_00001.json").unlink()
    assert load_left_out(tmp_path, [0, 1]).counts["empty documents"].count == 1, "made before"


def write_megatron_store(prefix: Path, documents: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_existing_token_store_is_split_without_changes(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    eos = build_vocabulary(tokenizer).eos
    documents = [[100, 101 + number, eos] for number in range(20)] + [[200, 201]]
    write_megatron_store(tmp_path / "theirs", documents)
    files = find_files([str(tmp_path / "theirs.idx")])
    dataset = make_store(tmp_path / "store", group_files(files), tokenizer)
    stores = (dataset.train[0].store, dataset.held_out)
    documents_read = [
        store.read_document(n).tolist() for store in stores for n in range(store.num_documents)
    ]
    assert sorted(documents_read) == sorted([*documents[:20], [200, 201, eos]])
    assert dataset.held_out.num_documents == 5
    assert dataset.manifest.train.text_bytes == 0


@pytest.mark.parametrize("token", [-1, 5, 330])
def test_tokens_of_another_tokenizer_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, token: int
) -> None:
    write_megatron_store(tmp_path / "theirs", [[100, 101], [100, token]])
    files = find_files([str(tmp_path / "theirs.bin")])
    with pytest.raises(CorpusError, match=r"theirs\.bin: document 1 .* set data\.tokenizer"):
        make_store(tmp_path / "store", group_files(files), tokenizer)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10] * 100, 1),
        ([MIN_SHARD_BYTES // 2] * 20, 10),
        ([2**24] * 256, 64),
        ([MAX_SHARD_BYTES // 4] * 1024, 256),
        ([MAX_SHARD_BYTES * 9, 1, 1], 65),
    ],
)
def test_groups_are_few_and_of_similar_size(sizes: list[int], expected: int) -> None:
    files = [make_file(size) for size in sizes]
    groups = group_files(files)
    assert [group.number for group in groups] == list(range(expected))
    parts = [part for group in groups for part in group.files]
    assert [part for part in parts if not part.begin] == [
        replace(file, size=part.size)
        for file, part in zip(files, (part for part in parts if not part.begin), strict=True)
    ]
    assert sum(part.size for part in parts) == sum(sizes)


def test_unsplittable_file_is_a_group_of_any_size() -> None:
    files = [SourceFile(Path("a.gz"), "a.gz", size, 0) for size in (MAX_SHARD_BYTES * 9, 1, 1)]
    assert [group.size for group in group_files(files)] == [MAX_SHARD_BYTES * 9, 2]
