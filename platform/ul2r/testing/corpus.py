"""A tiny corpus and its token store, identical wherever and whenever they are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ul2r.config.data import MAX_HELD_OUT_TOKENS
from ul2r.data.prepare.merge import HeldOutLimits, merge_shards
from ul2r.data.prepare.shards import group_files, write_shard
from ul2r.data.prepare.source_files import find_files
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer, train_tokenizer
from ul2r.paths import TOKENIZER_FILE

SUBJECTS = [
    "the cat",
    "a small dog",
    "my friend",
    "the old miller",
    "every child",
    "nobody",
    "the river",
    "a letter",
]
VERBS = ["sees", "carries", "forgets", "paints", "follows", "breaks", "waits for", "sings to"]
OBJECTS = [
    "a red door",
    "the moon",
    "two apples",
    "the last train",
    "its shadow",
    "an open book",
    "the sea",
    "snow",
]
ENDINGS = [".", "!", "?", ", and then rests.", "; so it was in the year 1887."]


def write_texts(
    folder: Path, num_documents: int = 64, num_sentences: int = 40, seed: int = 0
) -> list[str]:
    """Write different .txt files of plain sentences to `folder`; return their texts in order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for document in range(num_documents):
        # A generator for each document, so that its text does not depend on how many documents there are.
        generator = np.random.Generator(np.random.Philox(key=[seed, document]))
        lines = [f"Story {document}\n"]
        for _ in range(num_sentences):
            words = (str(generator.choice(choices)) for choices in (SUBJECTS, VERBS, OBJECTS))
            lines.append(" ".join(words).capitalize() + str(generator.choice(ENDINGS)) + "\n")
        texts.append("".join(lines))
        (folder / f"story_{document:04d}.txt").write_text(texts[-1], encoding="utf-8")
    return texts


def make_tiny_store(
    folder: Path,
    *,
    num_documents: int = 64,
    num_sentences: int = 40,
    vocabulary_size: int = 512,
    num_sentinels: int = 64,
    held_out_fraction: float = 0.1,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> TokenDataset:
    """Make a complete token store from `write_texts` in this process, without Ray.

    Args:
        folder: Folder of the store (a recipe's `storage_paths.store`); created if missing.
        num_documents: Documents, held-out ones included.
        num_sentences: Sentences per document, about 15 tokens each.
        vocabulary_size: Entries of the tokenizer; at least 260 + `num_sentinels`.
        num_sentinels: Sentinel tokens.
        held_out_fraction: Fraction of the tokens to hold out.
        seed: Seed of the text.
        tokenizer: A tokenizer.json to use instead of training one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as texts_folder:
        texts = write_texts(Path(texts_folder), num_documents, num_sentences, seed)
        loaded = (
            load_tokenizer(tokenizer)
            if tokenizer
            else train_tokenizer(texts, vocabulary_size, num_sentinels)
        )
        # Before the shards are merged: the manifest records the tokenizer's digest.
        loaded.save(str(folder / TOKENIZER_FILE))

        vocabulary = build_vocabulary(loaded)
        groups = group_files(find_files([texts_folder]))
        for group in groups:
            write_shard(group, folder, loaded, vocabulary)
    held_out = HeldOutLimits(held_out_fraction, MAX_HELD_OUT_TOKENS)
    merge_shards(folder, len(groups), held_out, vocabulary, inputs={"corpus": "testing"})
    return open_dataset(folder)


class SyntheticWindows:
    """A `WindowSource` of computed tokens.

    Args:
        make_window: Maps a sample and a length to that many tokens.
    """

    def __init__(self, make_window: Callable[[int, int], npt.ArrayLike]) -> None:
        self._make_window = make_window

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Write each sample's tokens to its line."""
        for line, sample, length in zip(windows, samples.tolist(), lengths.tolist(), strict=True):
            # An empty slot has nothing to read.
            if sample >= 0:
                line[:length] = self._make_window(sample, length)


def counting_windows(first: Callable[[int], int]) -> SyntheticWindows:
    """Return windows in which sample k reads the tokens `first(k)`, `first(k) + 1` and so on."""
    return SyntheticWindows(lambda sample, length: np.arange(first(sample), first(sample) + length))
