"""Shards joined to a store: to a shuffled one all at once, to a streamed one chapter by chapter.

Documents with the smallest keys are held out: the choice is as good as random, holds whatever else changes, and puts
equal documents on one side. A streamed store holds out documents of its first chapter; equal ones of later chapters are
left out of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.data.prepare.shards import remove_shard, shard_documents, shard_prefix
from ul2r.data.store.manifest import STORE_FILES, Manifest, Split, digest
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.errors import CorpusError
from ul2r.objective.vocabulary import Vocabulary

HELD_OUT_KEYS = "held_out.npy"
"""Keys of the documents that a streamed store holds out, uint64, sorted."""

Keys = npt.NDArray[np.uint64]


def merge_shards(
    folder: Path,
    shards: int,
    held_out: float,
    vocabulary: Vocabulary,
    inputs: Mapping[str, Any],
) -> Manifest:
    """Join the shards in `folder` to a token store there, beside its tokenizer.json, and remove them.

    Args:
        folder: Where `write_shard` wrote, and the store's files go; the manifest comes last.
        shards: Number of shards.
        held_out: Share of the documents to hold out; one at least is, and one at least is not.
        vocabulary: Of the tokenizer.
        inputs: See `Manifest`.

    Raises:
        CorpusError: If there are not two different documents.
    """
    train, held = _split(folder, range(shards), folder / "train", held_out, vocabulary)
    files = {name: digest(folder / name) for name in STORE_FILES}
    for number in range(shards):
        remove_shard(folder, number)
    manifest = Manifest(inputs, vocabulary, train, held, files)
    manifest.write(folder)
    return manifest


def merge_first(
    work: Path,
    shards: Sequence[int],
    prefix: Path,
    held_out: float,
    vocabulary: Vocabulary,
) -> tuple[Split, Split]:
    """Join shards to the first chapter of a streamed store; they stay.

    Args:
        work: Where the shards are.
        shards: Their numbers.
        prefix: Where its tokens go; what is held out goes beside them.
        held_out: As in `merge_shards`, here of the chapter's documents.
        vocabulary: Of the tokenizer.

    Returns:
        What is to train on and what is held out.

    Raises:
        CorpusError: If there are not two different documents.
    """
    keys = _keys(work, shards)
    splits = _split(work, shards, prefix, held_out, vocabulary)
    np.save(prefix.parent / HELD_OUT_KEYS, np.unique(keys[keys <= _held_out_limit(keys, held_out)]))
    return splits


def merge_next(work: Path, shards: Sequence[int], prefix: Path, vocabulary: Vocabulary) -> Split:
    """Join shards to a later chapter; documents that the first one holds out are left out. See `merge_first`."""
    held_out: Keys = np.load(prefix.parent / HELD_OUT_KEYS)
    with TokenWriter(prefix, vocabulary.size) as train:
        text_bytes = 0
        for number in shards:
            left_out = np.isin(shard_documents(work, number)["key"], held_out)
            text_bytes += _copy(work, number, ~left_out, train)
    return Split(train.documents, train.tokens, text_bytes)


def can_be_split(work: Path, shards: Sequence[int]) -> bool:
    """Whether the shards hold two different documents."""
    keys = _keys(work, shards)
    return bool((keys[1:] != keys[:-1]).any())


def _split(
    work: Path,
    shards: Sequence[int],
    prefix: Path,
    held_out: float,
    vocabulary: Vocabulary,
) -> tuple[Split, Split]:
    """Copy the shards' documents to `prefix` and, a share of them, to held_out beside it."""
    limit = _held_out_limit(_keys(work, shards), held_out)
    sizes = [0, 0]
    with (
        TokenWriter(prefix, vocabulary.size) as train,
        TokenWriter(prefix.with_name("held_out"), vocabulary.size) as held,
    ):
        for number in shards:
            is_held = shard_documents(work, number)["key"] <= limit
            sizes[0] += _copy(work, number, ~is_held, train)
            sizes[1] += _copy(work, number, is_held, held)
    return (
        Split(train.documents, train.tokens, sizes[0]),
        Split(held.documents, held.tokens, sizes[1]),
    )


def _copy(work: Path, number: int, chosen: npt.NDArray[np.bool_], writer: TokenWriter) -> int:
    """Copy the chosen documents of a shard; returns the bytes of their text."""
    if not chosen.any():
        return 0
    store = TokenStore.open(shard_prefix(work, number))
    for document in np.flatnonzero(chosen).tolist():
        writer.append(store.document(document))
        writer.end_document()
    return int(shard_documents(work, number)["text_bytes"][chosen].sum())


def _keys(work: Path, shards: Sequence[int]) -> Keys:
    keys: Keys = np.concatenate([shard_documents(work, number)["key"] for number in shards])
    return keys


def _held_out_limit(keys: Keys, share: float) -> int:
    """The largest key held out."""
    count = len(keys)
    if not count:
        raise CorpusError(
            "the corpus holds no text: all its files are empty; set data.corpus to your text"
        )
    if np.all(keys == keys[0]):
        raise CorpusError(
            f"the corpus holds one document (in {count} copies), but one must be held out from training: "
            "add more text to data.corpus, or give one document a line as .jsonl"
        )
    smallest = np.sort(keys)[: min(max(round(share * count), 1), count - 1)]
    limit = smallest[-1]
    return int(limit if limit < keys.max() else np.max(keys[keys < limit]))
