"""Prepared data sets: a token store, or a blend of several, as `ul2r prepare` wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.store.manifest import BLEND_KEY, Manifest
from ul2r.data.store.merged import MergedStores
from ul2r.data.store.pair_store import (
    PairDataset,
    find_pairs_folder,
    open_pairs,
    read_pairs_manifest,
)
from ul2r.data.store.remote import fetch_store
from ul2r.data.store.segments import SegmentedStore
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError
from ul2r.filesystem import sha256_of
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import TOKENIZER_FILE


@dataclass(frozen=True)
class WeightedSource:
    """A store to train on and its weight in the blend."""

    store: TokenStore | SegmentedStore
    weight: float


@dataclass(frozen=True)
class TokenDataset:
    """Tokens to train on, held-out tokens, and their meaning.

    Attributes:
        train: One store, or those of a blend.
        held_out: Held-out documents of all stores.
        vocabulary: Meaning of the token ids.
        manifest: Description of the store, or of the blend.
        tokenizer_file: Its tokenizer.json.
        pairs: Pairs of prompt and answer, if the recipe has some.
    """

    train: tuple[WeightedSource, ...]
    held_out: TokenStore | MergedStores
    vocabulary: Vocabulary
    manifest: Manifest
    tokenizer_file: Path
    pairs: PairDataset | None = None


def open_run_dataset(recipe: Recipe, fingerprint: str | None = None) -> TokenDataset:
    """Open the token store of a recipe, and its pairs if it has some.

    Args:
        recipe: The run.
        fingerprint: Expected `run_fingerprint`, for a run that has started.

    Raises:
        CorpusError: As `open_dataset`, for the pairs as well.
    """
    if fingerprint is not None:
        check_fingerprint(recipe, fingerprint)
    dataset = open_dataset(recipe.storage_paths.store)
    if not recipe.data.pairs:
        return dataset
    return replace(dataset, pairs=open_pairs(recipe, dataset.manifest.tokenizer))


def is_prepared(recipe: Recipe) -> bool:
    """Return whether a recipe's token store exists, and its pairs if it has some."""
    has_pairs = not recipe.data.pairs or find_pairs_folder(recipe).exists()
    return recipe.storage_paths.store.exists() and has_pairs


def run_fingerprint(recipe: Recipe, dataset: TokenDataset) -> str:
    """Return the digest of all that a run is trained on: its token store, and its pairs if its mixture has them."""
    if recipe.objective.pairs is None:
        return dataset.manifest.fingerprint
    assert dataset.pairs is not None, "a mixture with pairs, but a data set without"
    return _join_fingerprints(dataset.manifest.fingerprint, dataset.pairs.manifest.fingerprint)


def check_fingerprint(recipe: Recipe, fingerprint: str) -> None:
    """Check that neither the token store nor the pairs of a run were replaced since it has started.

    Args:
        recipe: The run.
        fingerprint: Its `run_fingerprint`.

    Raises:
        CorpusError: If they were.
    """
    store = recipe.storage_paths.store
    if recipe.objective.pairs is None:
        read_manifest(store, fingerprint)
        return
    manifest = read_manifest(store, None)
    pairs = read_pairs_manifest(recipe, manifest.tokenizer)
    if fingerprint != _join_fingerprints(manifest.fingerprint, pairs.fingerprint):
        raise CorpusError(
            f"{store} or {find_pairs_folder(recipe)}: was replaced while a run reads it: restore it to resume, or "
            "train under another name"
        )


def _join_fingerprints(store: str, pairs: str) -> str:
    return hashlib.sha256(f"{store} {pairs}".encode()).hexdigest()


def open_dataset(folder: Path, fingerprint: str | None = None) -> TokenDataset:
    """Open the data set that `ul2r prepare` wrote to `folder`.

    Args:
        folder: A recipe's `storage_paths.store`.
        fingerprint: Expected fingerprint, for a run that has started.

    Raises:
        CorpusError: If the store, or one that a blend names, is missing, incomplete, damaged or replaced.
    """
    manifest = read_manifest(folder, fingerprint)
    tokenizer = folder / TOKENIZER_FILE
    # The only file that is hashed here: it is small. Token files are compared with their index by size alone.
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest.tokenizer:
        raise CorpusError(
            f"{tokenizer}: missing, or not the tokenizer that the store was made with: "
            f"delete {folder} and prepare it again"
        )

    if BLEND_KEY in manifest.inputs:
        return _open_blend(folder, manifest)
    train = (
        SegmentedStore(folder, manifest) if manifest.segments else TokenStore.open(folder / "train")
    )
    return TokenDataset(
        train=(WeightedSource(train, 1.0),),
        held_out=TokenStore.open(folder / "held_out"),
        vocabulary=manifest.vocabulary,
        manifest=manifest,
        tokenizer_file=tokenizer,
    )


def read_manifest(folder: Path, fingerprint: str | None) -> Manifest:
    """Read a store's manifest and check that it has the fingerprint that a run expects, if there is one.

    Raises:
        CorpusError: If the store is missing or damaged, or was replaced.
    """
    manifest = Manifest.read(folder)
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        raise CorpusError(
            f"{folder}: the token store was replaced while a run reads it (fingerprint {fingerprint[:8]} before, "
            f"{manifest.fingerprint[:8]} now): restore it to resume, or train under another name"
        )
    return manifest


def _open_blend(folder: Path, manifest: Manifest) -> TokenDataset:
    train = []
    held_out = []
    for entry in manifest.inputs[BLEND_KEY]:
        # A local folder is opened as it is, and a URL that is not cached gives what it holds now: hence the comparison.
        member = open_dataset(fetch_store(entry["store"], entry["fingerprint"]))
        if member.manifest.fingerprint != entry["fingerprint"]:
            raise CorpusError(
                f"{entry['store']}: was replaced after {folder} blended it: delete {folder} and run "
                "`ul2r prepare RECIPE` again, for new runs"
            )
        # A member has one source: `collect_blend_inputs` refuses blends of blends.
        train.append(WeightedSource(member.train[0].store, float(entry["weight"])))
        held_out.append(member.held_out)

    return TokenDataset(
        train=tuple(train),
        held_out=MergedStores(held_out),
        vocabulary=manifest.vocabulary,
        manifest=manifest,
        tokenizer_file=folder / TOKENIZER_FILE,
    )
