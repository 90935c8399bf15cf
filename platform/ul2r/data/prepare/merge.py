"""Shards merged into a store: a shuffled store at once, a streamed one segment by segment.

`held_out.py` chooses what is held out. A streamed store holds out documents of its first segment; copies of them in
later segments are excluded from training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ul2r.data.prepare.held_out import HeldOutSplit, Int64s, choose_held_out
from ul2r.data.prepare.shards import load_document_table, remove_shard, shard_prefix
from ul2r.data.store.index_file import IndexFile
from ul2r.data.store.manifest import STORE_FILES, Manifest, SplitCounts
from ul2r.data.store.token_store import TokenStore, TokenWriter, append_suffix
from ul2r.filesystem import sha256_of
from ul2r.objective.vocabulary import Vocabulary

HELD_OUT_KEYS = "held_out.npy"
"""Documents that a streamed store holds out, by `HeldOutSplit.save`."""


class HeldOutLimits(NamedTuple):
    """Tokens to hold out.

    Attributes:
        fraction: Fraction of all tokens.
        max_tokens: Most tokens.
    """

    fraction: float
    max_tokens: int


def merge_shards(
    folder: Path,
    num_shards: int,
    held_out: HeldOutLimits,
    vocabulary: Vocabulary,
    inputs: Mapping[str, Any],
) -> Manifest:
    """Merge the shards in `folder` into a token store there, next to its tokenizer.json, and remove them.

    Args:
        folder: Folder of the shards and of the store; the manifest is written last.
        num_shards: Number of shards.
        held_out: Tokens to hold out.
        vocabulary: Vocabulary of the tokenizer.
        inputs: See `Manifest`.

    Raises:
        CorpusError: As `choose_held_out`.
    """
    split = _choose(folder, range(num_shards), held_out)
    counts = _split_documents(folder, range(num_shards), folder / "train", split, vocabulary)
    # The shards go before the manifest is written: the caller renames this folder, and whatever is in it, to the store.
    files = {name: sha256_of(folder / name) for name in STORE_FILES}
    for number in range(num_shards):
        remove_shard(folder, number)

    manifest = Manifest(inputs, vocabulary, *counts, files)
    manifest.write(folder)
    return manifest


def merge_first_segment(
    work_folder: Path,
    shards: Sequence[int],
    prefix: Path,
    held_out: HeldOutLimits,
    vocabulary: Vocabulary,
) -> tuple[SplitCounts, SplitCounts]:
    """Merge shards into the first segment of a streamed store; the shards are kept.

    Args:
        work_folder: Folder of the shards.
        shards: Their numbers.
        prefix: Prefix of the segment; the held-out files are written to the same folder.
        held_out: As in `merge_shards`, but of the segment's documents.
        vocabulary: Vocabulary of the tokenizer.

    Returns:
        Sizes of the training and the held-out split.

    Raises:
        CorpusError: As `choose_held_out`.
    """
    split = _choose(work_folder, shards, held_out)
    # By keys: later segments may hold copies, which must not be trained on either.
    split.save(prefix.parent / HELD_OUT_KEYS)
    return _split_documents(work_folder, shards, prefix, split, vocabulary)


def merge_next_segment(
    work_folder: Path, shards: Sequence[int], prefix: Path, vocabulary: Vocabulary
) -> SplitCounts:
    """Merge shards into a later segment, without copies of held-out documents; see `merge_first_segment`."""
    split = HeldOutSplit.load(prefix.parent / HELD_OUT_KEYS)
    with TokenWriter(prefix, vocabulary.size) as train:
        text_bytes = 0
        for number in shards:
            shard = _Shard.open(work_folder, number, split)
            text_bytes += _copy_documents(shard, vocabulary, train, None)
    return SplitCounts(train.num_documents, train.num_tokens, text_bytes)


def count_tokens(work_folder: Path, shards: Sequence[int]) -> int:
    """Return the tokens of shards."""
    return sum(int(_document_sizes(work_folder, number).sum()) for number in shards)


def _choose(work_folder: Path, shards: Sequence[int], limits: HeldOutLimits) -> HeldOutSplit:
    keys = [load_document_table(work_folder, number)["key"] for number in shards]
    sizes = [_document_sizes(work_folder, number) for number in shards]
    return choose_held_out(
        np.concatenate(keys), np.concatenate(sizes), limits.fraction, limits.max_tokens
    )


def _document_sizes(work_folder: Path, shard: int) -> Int64s:
    """Return the tokens of a shard's documents, int64 (D,)."""
    # Not through TokenStore, which refuses a shard without documents.
    index = IndexFile.read(append_suffix(shard_prefix(work_folder, shard), ".idx"))
    return index.sequence_lengths.astype(np.int64)


def _split_documents(
    work_folder: Path,
    shards: Sequence[int],
    prefix: Path,
    split: HeldOutSplit,
    vocabulary: Vocabulary,
) -> tuple[SplitCounts, SplitCounts]:
    """Copy the shards' documents to `prefix`, and what is held out to "held_out" in the same folder."""
    train_bytes = 0
    held_out_bytes = 0
    with (
        TokenWriter(prefix, vocabulary.size) as train,
        TokenWriter(prefix.with_name("held_out"), vocabulary.size) as held_out,
    ):
        for number in shards:
            shard = _Shard.open(work_folder, number, split)
            copied = _copy_documents(shard, vocabulary, train, held_out)
            train_bytes += copied
            held_out_bytes += int(shard.text_bytes.sum()) - copied

    return (
        SplitCounts(train.num_documents, train.num_tokens, train_bytes),
        SplitCounts(held_out.num_documents, held_out.num_tokens, held_out_bytes),
    )


class _Shard(NamedTuple):
    """Documents of a shard, and their tokens that are held out.

    Attributes:
        prefix: Prefix of its token store.
        sizes: Tokens of each document, int64 (D,).
        held_out: Tokens at the end of each that are held out, int64 (D,).
        text_bytes: UTF-8 bytes of each one's text, int64 (D,).
    """

    prefix: Path
    sizes: Int64s
    held_out: Int64s
    text_bytes: Int64s

    @classmethod
    def open(cls, work_folder: Path, number: int, split: HeldOutSplit) -> _Shard:
        table = load_document_table(work_folder, number)
        sizes = _document_sizes(work_folder, number)
        return cls(
            shard_prefix(work_folder, number),
            sizes,
            split.count(table["key"], sizes),
            table["text_bytes"],
        )


def _copy_documents(
    shard: _Shard, vocabulary: Vocabulary, train: TokenWriter, held_out: TokenWriter | None
) -> int:
    """Copy a shard's documents to the writers of their sides; return the bytes of the training text.

    The bytes of a document that is cut are divided in proportion to its tokens.
    """
    # Not an optimization: a shard without documents has an empty .bin file, which TokenStore refuses to open.
    if not len(shard.sizes):
        return 0
    store = TokenStore.open(shard.prefix)
    # Document by document: memory does not grow with the shard.
    for number, num_held_out in enumerate(shard.held_out.tolist()):
        tokens = store.read_document(number)
        end = len(tokens) - num_held_out
        if end:
            train.append(tokens[:end])
            # Every document ends in an eos, so that none runs on into the next.
            if num_held_out:
                train.append([vocabulary.eos])
            train.end_document()
        if num_held_out and held_out is not None:
            held_out.append(tokens[end:])
            held_out.end_document()

    in_training = shard.text_bytes * (1 - shard.held_out / shard.sizes)
    return int(np.rint(in_training).sum())
