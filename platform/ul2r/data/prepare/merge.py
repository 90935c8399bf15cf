"""Shards merged into a store: a shuffled store at once, a streamed one segment by segment.

The documents with the smallest keys are held out: this choice is as good as random, does not depend on anything else,
and puts equal documents on one side. A streamed store holds out documents of its first segment; copies of them in later
segments are excluded from training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.data.prepare.shards import load_document_table, remove_shard, shard_prefix
from ul2r.data.store.manifest import STORE_FILES, Manifest, SplitCounts
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.filesystem import sha256_of
from ul2r.objective.vocabulary import Vocabulary

HELD_OUT_KEYS = "held_out.npy"
"""Keys of the documents that a streamed store holds out, uint64, sorted."""

Keys = npt.NDArray[np.uint64]


def merge_shards(
    folder: Path,
    num_shards: int,
    held_out_fraction: float,
    vocabulary: Vocabulary,
    inputs: Mapping[str, Any],
) -> Manifest:
    """Merge the shards in `folder` into a token store there, next to its tokenizer.json, and remove them.

    Args:
        folder: Folder of the shards and of the store; the manifest is written last.
        num_shards: Number of shards.
        held_out_fraction: Fraction of the documents to hold out; at least one document is, and at least one is not.
        vocabulary: Vocabulary of the tokenizer.
        inputs: See `Manifest`.

    Raises:
        CorpusError: If there are not two different documents.
    """
    train, held_out = _split_documents(
        folder, range(num_shards), folder / "train", held_out_fraction, vocabulary
    )
    # The shards go before the manifest is written: the caller renames this folder, and whatever is in it, to the store.
    files = {name: sha256_of(folder / name) for name in STORE_FILES}
    for number in range(num_shards):
        remove_shard(folder, number)

    manifest = Manifest(inputs, vocabulary, train, held_out, files)
    manifest.write(folder)
    return manifest


def merge_first_segment(
    work_folder: Path,
    shards: Sequence[int],
    prefix: Path,
    held_out_fraction: float,
    vocabulary: Vocabulary,
) -> tuple[SplitCounts, SplitCounts]:
    """Merge shards into the first segment of a streamed store; the shards are kept.

    Args:
        work_folder: Folder of the shards.
        shards: Their numbers.
        prefix: Prefix of the segment; the held-out files are written to the same folder.
        held_out_fraction: As in `merge_shards`, but of the segment's documents.
        vocabulary: Vocabulary of the tokenizer.

    Returns:
        Sizes of the training and the held-out split.

    Raises:
        CorpusError: If there are not two different documents.
    """
    keys = _load_keys(work_folder, shards)
    counts = _split_documents(work_folder, shards, prefix, held_out_fraction, vocabulary)
    held_out = keys[keys <= _largest_held_out_key(keys, held_out_fraction)]
    # Keys rather than documents: later segments may hold copies, which must not be trained on either.
    np.save(prefix.parent / HELD_OUT_KEYS, np.unique(held_out))
    return counts


def merge_next_segment(
    work_folder: Path, shards: Sequence[int], prefix: Path, vocabulary: Vocabulary
) -> SplitCounts:
    """Merge shards into a later segment, without copies of held-out documents; see `merge_first_segment`."""
    held_out: Keys = np.load(prefix.parent / HELD_OUT_KEYS)
    with TokenWriter(prefix, vocabulary.size) as train:
        text_bytes = 0
        for number in shards:
            is_held_out = np.isin(load_document_table(work_folder, number)["key"], held_out)
            text_bytes += _copy_documents(work_folder, number, ~is_held_out, train)
    return SplitCounts(train.num_documents, train.num_tokens, text_bytes)


def can_hold_out(work_folder: Path, shards: Sequence[int]) -> bool:
    """Return whether the shards hold two different documents."""
    keys = _load_keys(work_folder, shards)
    return bool((keys[1:] != keys[:-1]).any())


def _split_documents(
    work_folder: Path,
    shards: Sequence[int],
    prefix: Path,
    held_out_fraction: float,
    vocabulary: Vocabulary,
) -> tuple[SplitCounts, SplitCounts]:
    """Copy the shards' documents to `prefix`, and the held-out ones to "held_out" in the same folder."""
    limit = _largest_held_out_key(_load_keys(work_folder, shards), held_out_fraction)
    train_bytes = 0
    held_out_bytes = 0
    # By key, not by number: all copies of a document have one key, and so end up on one side.
    with (
        TokenWriter(prefix, vocabulary.size) as train,
        TokenWriter(prefix.with_name("held_out"), vocabulary.size) as held_out,
    ):
        for number in shards:
            is_held_out = load_document_table(work_folder, number)["key"] <= limit
            train_bytes += _copy_documents(work_folder, number, ~is_held_out, train)
            held_out_bytes += _copy_documents(work_folder, number, is_held_out, held_out)

    return (
        SplitCounts(train.num_documents, train.num_tokens, train_bytes),
        SplitCounts(held_out.num_documents, held_out.num_tokens, held_out_bytes),
    )


def _copy_documents(
    work_folder: Path, shard: int, is_chosen: npt.NDArray[np.bool_], writer: TokenWriter
) -> int:
    """Copy the chosen documents of a shard; return the bytes of their text."""
    # Not an optimization: a shard without documents has an empty .bin file, which TokenStore refuses to open.
    if not is_chosen.any():
        return 0
    store = TokenStore.open(shard_prefix(work_folder, shard))
    # Document by document: memory does not grow with the shard.
    for document in np.flatnonzero(is_chosen).tolist():
        writer.append(store.read_document(document))
        writer.end_document()
    return int(load_document_table(work_folder, shard)["text_bytes"][is_chosen].sum())


def _load_keys(work_folder: Path, shards: Sequence[int]) -> Keys:
    tables = [load_document_table(work_folder, number)["key"] for number in shards]
    keys: Keys = np.concatenate(tables)
    return keys


def _largest_held_out_key(keys: Keys, fraction: float) -> int:
    count = len(keys)
    if not count:
        raise CorpusError(
            "the corpus has no text, all its files are empty: set data.corpus to your text"
        )
    if np.all(keys == keys[0]):
        raise CorpusError(
            f"the corpus has one document (in {count} copies), but one must be held out from training: "
            "add more text to data.corpus, or write one document per line as .jsonl"
        )

    # The bounds leave at least one document on each side, whatever the fraction rounds to.
    smallest = np.sort(keys)[: min(max(round(fraction * count), 1), count - 1)]
    limit = smallest[-1]
    # Copies of one document share a key: if they reached the largest, no document would be left to train on.
    return int(limit if limit < keys.max() else np.max(keys[keys < limit]))
