"""From files of prompts and answers to a store of pairs, with the tokenizer of the recipe's token store."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.config import Data, Recipe
from ul2r.console import show_progress
from ul2r.data.prepare.held_out import choose_whole_held_out
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.pair_shards import PairSettings, make_pair_shards
from ul2r.data.prepare.shards import (
    FileGroup,
    group_files,
    load_document_table,
    load_left_out,
    remove_shard,
    shard_prefix,
)
from ul2r.data.prepare.source_files import SourceFile, list_corpus
from ul2r.data.prepare.suffixes import SPLITTABLE_SUFFIXES, text_suffix
from ul2r.data.store.index_file import IndexFile
from ul2r.data.store.manifest import Manifest, SplitCounts
from ul2r.data.store.pair_store import PAIR_SPLITS, SEQUENCES_PER_PAIR, find_pairs_folder
from ul2r.data.store.token_store import TokenStore, TokenWriter, append_suffix
from ul2r.errors import CorpusError, RecipeError
from ul2r.filesystem import STAGING_SUFFIX, file_lock, remove, sha256_of, staging_path
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE

logger = logging.getLogger(__name__)

PAIRS_KEY = "data.pairs"
SETTING = "data.pairs"
PAIR_SUFFIXES = (*SPLITTABLE_SUFFIXES, ".parquet")
MEGABYTE = 1e6


def load_finished_pairs(recipe: Recipe) -> Manifest | None:
    """Return the description of a recipe's pairs, or None if they are not prepared.

    Raises:
        CorpusError: If the files cannot be found, or have changed since the pairs were made.
    """
    folder = find_pairs_folder(recipe)
    inputs = _collect_inputs(recipe.data, _list_files(recipe.data)[0])
    if not folder.exists():
        return None
    manifest = Manifest.read(folder)
    if manifest.inputs.get("listing") != inputs["listing"]:
        raise CorpusError(
            f"{folder}: files of {SETTING}={list(recipe.data.pairs)} changed since it was made "
            f"({manifest.inputs.get('files')} files of {manifest.inputs.get('bytes')} bytes then, {inputs['files']} of "
            f"{inputs['bytes']} now): set storage to another folder, or delete {folder}"
        )
    return manifest


def prepare_pairs(recipe: Recipe) -> Manifest:
    """Make the store of a recipe's pairs unless it exists; the recipe's token store must exist.

    Many pairs are encoded by all cores, or by the connected Ray cluster.

    Raises:
        CorpusError: If a record is no pair, or there are too few; nothing is left behind.
        RecipeError: If storage is not writable.
    """
    finished = load_finished_pairs(recipe)
    if finished is not None:
        return finished
    folder = find_pairs_folder(recipe)
    staging = staging_path(folder)
    try:
        # Several processes may get here at once; those that wait find the pairs made.
        with file_lock(folder):
            finished = load_finished_pairs(recipe)
            if finished is not None:
                return finished
            for leftover in folder.parent.glob(f".{folder.name}.*{STAGING_SUFFIX}"):
                remove(leftover)
            staging.mkdir()
            try:
                manifest = _build(recipe, staging)
                staging.replace(folder)
            finally:
                remove(staging)
    except OSError as error:
        raise RecipeError(f"storage={recipe.storage}: not writable: {error.strerror}") from None
    return manifest


def _list_files(data: Data) -> tuple[tuple[SourceFile, ...], LeftOut]:
    """List the files of pairs, and what is left out.

    Raises:
        CorpusError: If an entry is missing, or there is no file of pairs.
    """
    listing = list_corpus(data.pairs, setting=SETTING)
    files = [file for file in listing.files if text_suffix(file.path) in PAIR_SUFFIXES]
    left_out = LeftOut()
    left_out.update(listing.left_out)
    for file in listing.files:
        if file not in files:
            left_out.add_file(file.path, file.size)
    if not files:
        has = f"; they have {left_out.describe()}" if left_out else ""
        raise CorpusError(
            f"{SETTING}={list(data.pairs)}: no .jsonl or .parquet file (plain, .gz or .zst), with a pair in each "
            f"record{has}"
        )
    return tuple(files), left_out


def _collect_inputs(data: Data, files: tuple[SourceFile, ...]) -> dict[str, Any]:
    listing = json.dumps([(file.name, file.size, file.modified_ns) for file in files])
    return {
        PAIRS_KEY: list(data.pairs),
        "data.prompt_key": data.prompt_key,
        "data.answer_key": data.answer_key,
        "data.held_out": data.held_out_fraction,
        "data.max_held_out_tokens": data.max_held_out_tokens,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "listing": hashlib.sha256(listing.encode()).hexdigest(),
    }


def _build(recipe: Recipe, folder: Path) -> Manifest:
    """Write the store of pairs into an empty folder."""
    data = recipe.data
    files, left_out = _list_files(data)
    store = recipe.storage_paths.store
    vocabulary = Manifest.read(store).vocabulary
    shutil.copyfile(store / TOKENIZER_FILE, folder / TOKENIZER_FILE)

    groups = group_files(files)
    _make_shards(
        groups, PairSettings(folder, vocabulary, data.prompt_key, data.answer_key, data.tokenizer)
    )
    left_out.update(load_left_out(folder, range(len(groups))))
    counts = _merge(folder, len(groups), data, vocabulary)
    for number in range(len(groups)):
        remove_shard(folder, number)

    names = [
        TOKENIZER_FILE,
        *(f"{split}{suffix}" for split in PAIR_SPLITS for suffix in (".bin", ".idx")),
    ]
    manifest = Manifest(
        inputs=_collect_inputs(data, files),
        vocabulary=vocabulary,
        train=counts["train"],
        held_out=counts["held_out"],
        files={name: sha256_of(folder / name) for name in names},
        left_out=left_out.to_dict(),
    )
    manifest.write(folder)
    return manifest


def _make_shards(groups: Sequence[FileGroup], settings: PairSettings) -> None:
    """Make the shards of all groups, and show how much of the files is read."""
    total = sum(group.size for group in groups)
    done = 0
    with show_progress("pairs", total / MEGABYTE, "MB") as bar:
        for group in make_pair_shards(groups, settings):
            done += group.size
            bar.update(done / MEGABYTE)


def _merge(
    folder: Path, num_shards: int, data: Data, vocabulary: Vocabulary
) -> Mapping[str, SplitCounts]:
    """Divide the pairs of the shards into those to train on and held-out ones.

    Raises:
        CorpusError: If there are none, or they have one prompt only.
    """
    shards = [shard for number in range(num_shards) if len(shard := _Shard.open(folder, number))]
    if not shards:
        raise CorpusError(f"{SETTING}={list(data.pairs)}: the files have no pair")
    keys = np.concatenate([shard.table["key"] for shard in shards])
    sizes = np.concatenate([shard.sizes for shard in shards])
    split = choose_whole_held_out(keys, sizes, data.held_out_fraction, data.max_held_out_tokens)
    is_held_out = split.count(keys, sizes) > 0
    if is_held_out.all() or not is_held_out.any():
        raise CorpusError(
            f"{SETTING}={list(data.pairs)}: {len(keys)} pairs of one prompt cannot be divided into pairs to train on "
            "and held-out ones: add pairs with other prompts"
        )

    ends = np.cumsum([len(shard) for shard in shards])
    counts = {}
    for name, chosen in zip(PAIR_SPLITS, (~is_held_out, is_held_out), strict=True):
        text_bytes = 0
        with TokenWriter(
            folder / name, vocabulary.size, sequences_per_document=SEQUENCES_PER_PAIR
        ) as writer:
            for shard, of_shard in zip(shards, np.split(chosen, ends[:-1]), strict=True):
                shard.copy(of_shard, writer)
                text_bytes += int(shard.table["text_bytes"][of_shard].sum())
        counts[name] = SplitCounts(writer.num_documents, writer.num_tokens, text_bytes)
    return counts


@dataclass(frozen=True, eq=False)
class _Shard:
    """Pairs of a shard.

    Attributes:
        prefix: Prefix of its token store.
        table: Its records, `DOCUMENT_DTYPE` (N,).
        lengths: Tokens of each prompt and answer, int64 (N, 2).
    """

    prefix: Path
    table: npt.NDArray[np.void]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, number: int) -> _Shard:
        prefix = shard_prefix(folder, number)
        # Not through TokenStore, which refuses a shard without documents.
        lengths = IndexFile.read(append_suffix(prefix, ".idx")).sequence_lengths
        return cls(
            prefix,
            load_document_table(folder, number),
            lengths.astype(np.int64).reshape(-1, SEQUENCES_PER_PAIR),
        )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens of each pair, int64 (N,)."""
        sizes: npt.NDArray[np.int64] = self.lengths.sum(axis=1)
        return sizes

    def copy(self, chosen: npt.NDArray[np.bool_], writer: TokenWriter) -> None:
        """Copy the chosen pairs, bool (N,), in their order."""
        store = TokenStore.open(self.prefix)
        for number in np.flatnonzero(chosen).tolist():
            for part in np.split(store.read_document(number), [self.lengths[number, 0]]):
                writer.append(part)
                writer.end_document()
