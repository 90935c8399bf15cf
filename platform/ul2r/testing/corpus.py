"""A tiny corpus and its token store, the same wherever and whenever they are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ul2r.data.prepare.merge import merge_shards
from ul2r.data.prepare.shards import group_files, write_shard
from ul2r.data.prepare.source_files import find_files
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_of

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
ENDS = [".", "!", "?", ", and then rests.", "; so it was in the year 1887."]


def write_texts(folder: Path, documents: int = 64, sentences: int = 40, seed: int = 0) -> list[str]:
    """Write `documents` different .txt files of plain sentences to `folder`; return their texts in name order."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for document in range(documents):
        draw = np.random.Generator(np.random.Philox(key=[seed, document]))
        lines = [f"Story {document}\n"]
        for _ in range(sentences):
            words = (str(draw.choice(choices)) for choices in (SUBJECTS, VERBS, OBJECTS))
            lines.append(" ".join(words).capitalize() + str(draw.choice(ENDS)) + "\n")
        texts.append("".join(lines))
        (folder / f"story_{document:04d}.txt").write_text(texts[-1], encoding="utf-8")
    return texts


def tiny_store(
    folder: Path,
    *,
    documents: int = 64,
    sentences: int = 40,
    vocabulary_size: int = 512,
    sentinels: int = 64,
    held_out: float = 0.1,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> TokenDataset:
    """Make a whole token store in `folder` (a recipe's `storage_paths.store`) from `write_texts`, in this process.

    Args:
        folder: Where the store goes; made if need be.
        documents: Number of documents, train and held out together.
        sentences: Sentences of each, of about 15 tokens.
        vocabulary_size: Entries of the tokenizer; at least 260 + `sentinels`.
        sentinels: Sentinel tokens.
        held_out: Share of the documents held out.
        seed: Of the text.
        tokenizer: A tokenizer.json to use instead of training one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as texts_folder:
        texts = write_texts(Path(texts_folder), documents, sentences, seed)
        trained = (
            load_tokenizer(tokenizer)
            if tokenizer
            else train_tokenizer(texts, vocabulary_size, sentinels)
        )
        trained.save(str(folder / "tokenizer.json"))
        vocabulary = vocabulary_of(trained)
        groups = group_files(find_files([texts_folder]))
        for group in groups:
            write_shard(group, folder, trained, vocabulary)
    merge_shards(folder, len(groups), held_out, vocabulary, inputs={"corpus": "testing"})
    return open_dataset(folder)


class MadeText:
    """A `WindowSource` of made tokens.

    Args:
        window: From a sample and a length to that many tokens.
    """

    def __init__(self, window: Callable[[int, int], npt.ArrayLike]) -> None:
        self.window = window

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Write each sample's tokens to its line."""
        for line, sample, length in zip(windows, samples.tolist(), lengths.tolist(), strict=True):
            if sample >= 0:
                line[:length] = self.window(sample, length)


def counted_text(first: Callable[[int], int]) -> MadeText:
    """Sample k reads the tokens `first(k)`, `first(k) + 1` and on."""
    return MadeText(lambda sample, length: np.arange(first(sample), first(sample) + length))
