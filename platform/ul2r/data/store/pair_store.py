"""Pairs of prompt and answer on disk: token stores whose documents have two sequences each.

They are in a folder of their own next to the recipe's token store, made with its tokenizer, so that all runs of a
storage can share the text and train on different pairs, or on none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ul2r.config import Recipe
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError

SEQUENCES_PER_PAIR = 2
PAIR_SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PairStore:
    """Pairs of one side of the held-out split.

    Attributes:
        store: Their tokens; a document is a prompt and its answer, without any special token of the objective.
    """

    store: TokenStore

    @classmethod
    def open(cls, prefix: Path) -> PairStore:
        """Open a token store of pairs.

        Raises:
            CorpusError: If it is missing, damaged, or no store of pairs.
        """
        store = TokenStore.open(prefix)
        if not (np.diff(store.document_indices) == SEQUENCES_PER_PAIR).all():
            raise CorpusError(
                f"{prefix}: not a store of pairs, or its index is damaged: delete {prefix.parent} and prepare it again"
            )
        return cls(store)

    def __len__(self) -> int:
        return self.store.num_documents

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt, int64 (N,)."""
        return self.store.sequence_lengths[0::SEQUENCES_PER_PAIR].astype(np.int64)

    @property
    def answer_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each answer, int64 (N,)."""
        return self.store.sequence_lengths[1::SEQUENCES_PER_PAIR].astype(np.int64)

    def read(self, number: int) -> npt.NDArray[np.int32]:
        """Return the tokens of a prompt and its answer, int32 (length,)."""
        return self.store.read_document(number)


@dataclass(frozen=True)
class PairDataset:
    """Pairs to train on, and held-out ones.

    Attributes:
        train: Pairs to train on.
        held_out: Pairs with other prompts, to measure on.
        manifest: Their description.
    """

    train: PairStore
    held_out: PairStore
    manifest: Manifest


def find_pairs_folder(recipe: Recipe) -> Path:
    """Return the folder of the pairs that a recipe names, which depends on its settings alone, not on the files."""
    data = recipe.data
    settings = [
        list(data.pairs),
        data.prompt_key,
        data.answer_key,
        data.held_out_fraction,
        data.max_held_out_tokens,
    ]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return recipe.storage_paths.pairs(digest[:16])


def read_pairs_manifest(recipe: Recipe, tokenizer: str) -> Manifest:
    """Read the description of a recipe's pairs.

    Args:
        recipe: A recipe with `data.pairs`.
        tokenizer: Digest of the tokenizer of its token store.

    Raises:
        CorpusError: If the pairs are missing or damaged, or were made with another tokenizer.
    """
    folder = find_pairs_folder(recipe)
    if not folder.exists():
        raise CorpusError(
            f"{folder}: the pairs of data.pairs={list(recipe.data.pairs)} are not prepared: run `ul2r prepare RECIPE` "
            "first"
        )
    manifest = Manifest.read(folder)
    if manifest.tokenizer != tokenizer:
        raise CorpusError(
            f"{folder}: made with another tokenizer than {recipe.storage_paths.store}: delete {folder} and run "
            "`ul2r prepare RECIPE` again"
        )
    return manifest


def open_pairs(recipe: Recipe, tokenizer: str) -> PairDataset:
    """Open the pairs of a recipe; see `read_pairs_manifest`."""
    manifest = read_pairs_manifest(recipe, tokenizer)
    folder = find_pairs_folder(recipe)
    train, held_out = (PairStore.open(folder / split) for split in PAIR_SPLITS)
    return PairDataset(train, held_out, manifest)
