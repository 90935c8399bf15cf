"""From files of prompts and answers to a store of pairs, with the tokenizer of the recipe's token store."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.config import Data, Recipe
from ul2r.console import show_progress
from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.held_out import choose_whole_held_out
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.pair_records import PairReader, PairText
from ul2r.data.prepare.source_files import SourceFile, list_corpus
from ul2r.data.prepare.suffixes import SPLITTABLE_SUFFIXES, text_suffix
from ul2r.data.store.manifest import Manifest, SplitCounts
from ul2r.data.store.pair_store import PAIR_SPLITS, SEQUENCES_PER_PAIR, find_pairs_folder
from ul2r.data.store.token_store import TokenStore, TokenWriter
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import CorpusError, RecipeError
from ul2r.filesystem import STAGING_SUFFIX, file_lock, remove, sha256_of, staging_path
from ul2r.objective import Vocabulary
from ul2r.paths import TOKENIZER_FILE

logger = logging.getLogger(__name__)

PAIRS_KEY = "data.pairs"
SETTING = "data.pairs"
ALL_PAIRS = "all"
"""Prefix of the store in which pairs are before they are split."""
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
    """Make the store of a recipe's pairs in this process unless it exists; the recipe's token store must exist.

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
    files = [file for file in listing.files if text_suffix(file.path) in SPLITTABLE_SUFFIXES]
    left_out = LeftOut()
    left_out.update(listing.left_out)
    for file in listing.files:
        if file not in files:
            left_out.add_file(file.path, file.size)
    if not files:
        has = f"; they have {left_out.describe()}" if left_out else ""
        raise CorpusError(
            f"{SETTING}={list(data.pairs)}: no .jsonl file (plain, .gz or .zst), with a pair in each line{has}"
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

    encoder = PairEncoder(folder / TOKENIZER_FILE, vocabulary)
    reader = PairReader(data.prompt_key, data.answer_key, data.tokenizer)
    keys = array("Q")
    text_bytes = array("q")
    with TokenWriter(
        folder / ALL_PAIRS, vocabulary.size, sequences_per_document=SEQUENCES_PER_PAIR
    ) as writer:
        for record in _show_records(files, reader):
            key = _digest(record.pairs[0][0])
            encoded = encoder.encode(record)
            if encoded is None:
                left_out.add("chats that spell a mode or sentinel", 0, record.locate)
                continue
            for (prompt, answer), tokens in zip(record.pairs, encoded, strict=True):
                for part in tokens:
                    writer.append(part)
                    writer.end_document()
                keys.append(key)
                text_bytes.append(len(prompt.encode()) + len(answer.encode()))

    if not len(keys):
        raise CorpusError(f"{SETTING}={list(data.pairs)}: the files have no pair")
    counts = _split(folder, data, np.array(keys, np.uint64), np.array(text_bytes), vocabulary)
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


def _show_records(files: tuple[SourceFile, ...], reader: PairReader) -> Iterator[PairText]:
    """Yield the records of all files, and show how many of the files are read."""
    total = sum(file.size for file in files)
    done = 0
    with show_progress("pairs", total / MEGABYTE, "MB") as bar:
        for file in files:
            yield from reader.read(file)
            done += file.size
            bar.update(done / MEGABYTE)


def _digest(prompt: str) -> int:
    # Of the first prompt alone: pairs that share it, and the turns of a chat, are on one side of the held-out split.
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


class PairEncoder:
    """Encodes pairs as the prompts of a served model are, and what it generates.

    A prompt begins a document, and an answer goes on in it: `LanguageModel.encode` gives the same tokens for a prompt.
    Special tokens that a text spells are plain text, but in a chat those of its template are meant, as in
    `apply_chat_template` of transformers.

    Args:
        tokenizer: The token store's tokenizer.json.
        vocabulary: Its vocabulary.
    """

    def __init__(self, tokenizer: Path, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._text = DocumentTokenizer(load_tokenizer(tokenizer))
        self._chat = load_chat_tokenizer(tokenizer)

    def encode(self, record: PairText) -> list[tuple[list[int], list[int]]] | None:
        """Return the tokens of each prompt and answer, None if they have tokens that only the objective may use.

        The answer's closing eos is left to the objective, which puts one behind every target.

        Raises:
            CorpusError: If a text has no token.
        """
        tokenizer = self._chat if record.is_chat else self._text
        encoded = []
        for prompt, answer in record.pairs:
            inputs = tokenizer.encode(prompt)
            targets = tokenizer.encode_continuation(answer)
            if targets and targets[-1] == self._vocabulary.eos:
                targets = targets[:-1]
            for name, tokens in (("prompt", inputs), ("answer", targets)):
                if not tokens:
                    raise CorpusError(
                        f"{record.locate()}: the {name} has no token: fill it in or leave the line out"
                    )
            if not self._vocabulary.non_text_ids.isdisjoint((*inputs, *targets)):
                return None
            encoded.append((inputs, targets))
        return encoded


def load_chat_tokenizer(path: Path) -> DocumentTokenizer:
    """Load a tokenizer that takes the names of special tokens for these tokens."""
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = False
    return DocumentTokenizer(tokenizer)


def _split(
    folder: Path,
    data: Data,
    keys: npt.NDArray[np.uint64],
    text_bytes: npt.NDArray[np.int64],
    vocabulary: Vocabulary,
) -> Mapping[str, SplitCounts]:
    """Divide the pairs into those to train on and held-out ones, and remove the store of all.

    Raises:
        CorpusError: If they have one prompt only.
    """
    store = TokenStore.open(folder / ALL_PAIRS)
    lengths = store.sequence_lengths
    sizes = lengths.astype(np.int64).reshape(-1, SEQUENCES_PER_PAIR).sum(axis=1)
    split = choose_whole_held_out(keys, sizes, data.held_out_fraction, data.max_held_out_tokens)
    is_held_out = split.count(keys, sizes) > 0
    if is_held_out.all() or not is_held_out.any():
        raise CorpusError(
            f"{SETTING}={list(data.pairs)}: {len(keys)} pairs of one prompt cannot be divided into pairs to train on "
            "and held-out ones: add pairs with other prompts"
        )

    counts = {}
    for name, chosen in zip(PAIR_SPLITS, (~is_held_out, is_held_out), strict=True):
        with TokenWriter(
            folder / name, vocabulary.size, sequences_per_document=SEQUENCES_PER_PAIR
        ) as writer:
            for number in np.flatnonzero(chosen).tolist():
                tokens = store.read_document(number)
                for part in np.split(tokens, [lengths[SEQUENCES_PER_PAIR * number]]):
                    writer.append(part)
                    writer.end_document()
        counts[name] = SplitCounts(
            writer.num_documents, writer.num_tokens, int(text_bytes[chosen].sum())
        )
    del store, lengths
    for suffix in (".bin", ".idx"):
        remove(folder / f"{ALL_PAIRS}{suffix}")
    return counts
