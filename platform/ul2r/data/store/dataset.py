"""What `jobs/prepare.py` left to train on: a token store, or a blend of several."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ul2r.config import WeightedStore
from ul2r.data.sampling.blend import MergedStores, shares
from ul2r.data.store.manifest import Manifest, Split, digest
from ul2r.data.store.remote import local_store
from ul2r.data.store.segments import SegmentedStore
from ul2r.data.store.token_store import TokenStore
from ul2r.errors import CorpusError
from ul2r.objective.vocabulary import Vocabulary

BLEND = "data.blend"
"""Names the stores of a blend among the inputs in its manifest."""


@dataclass(frozen=True)
class Share:
    """A store to train on and its weight in the blend."""

    store: TokenStore | SegmentedStore
    weight: float


@dataclass(frozen=True)
class TokenDataset:
    """A prepared corpus: tokens to train on, tokens held out, and what their numbers mean."""

    train: tuple[Share, ...]
    """One store, or those of a blend."""
    held_out: TokenStore | MergedStores
    vocabulary: Vocabulary
    manifest: Manifest
    tokenizer_file: Path


def open_dataset(folder: Path, fingerprint: str | None = None) -> TokenDataset:
    """Open what `jobs/prepare.py` made in `folder`.

    Args:
        folder: A recipe's `storage_paths.store`.
        fingerprint: What the manifest's must be, for a run that has begun.

    Raises:
        CorpusError: If it is missing, incomplete or damaged, or a store of a blend is, or is another one by now.
    """
    manifest = Manifest.read(folder)
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        raise CorpusError(
            f"{folder}: the token store was made anew while a run reads it (fingerprint {fingerprint[:8]} then, "
            f"{manifest.fingerprint[:8]} now): put the old one back to go on, or train under another name"
        )
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file() or digest(tokenizer) != manifest.files[tokenizer.name]:
        raise CorpusError(
            f"{tokenizer}: is missing or not the one that the store was made with; "
            f"delete {folder} and prepare it again"
        )
    if BLEND not in manifest.inputs:
        text = (
            SegmentedStore(folder, manifest)
            if manifest.chapters
            else TokenStore.open(folder / "train")
        )
        held_out = TokenStore.open(folder / "held_out")
        return TokenDataset((Share(text, 1.0),), held_out, manifest.vocabulary, manifest, tokenizer)
    members = []
    for entry in manifest.inputs[BLEND]:
        member = open_dataset(local_store(entry["store"], entry["fingerprint"]))
        if member.manifest.fingerprint != entry["fingerprint"]:
            raise CorpusError(
                f"{entry['store']}: was made anew since {folder} was blended of it; delete {folder} and run "
                "jobs/prepare.py RECIPE again, for new runs"
            )
        members.append((member, float(entry["weight"])))
    return TokenDataset(
        tuple(Share(member.train[0].store, weight) for member, weight in members),
        MergedStores([member.held_out for member, _ in members]),
        manifest.vocabulary,
        manifest,
        tokenizer,
    )


def blend_inputs(stores: Sequence[WeightedStore]) -> dict[str, Any]:
    """What a blend depends on, in plain JSON values.

    Raises:
        CorpusError: If a store is missing or a blend itself, is named twice, or has another tokenizer than the first,
            or if its weight is too small for a single sample in a block.
    """
    shares([one.weight for one in stores])
    names = [one.store for one in stores]
    corpora = [open_dataset(local_store(name)) for name in names]
    first = corpora[0].manifest
    for name, dataset in zip(names, corpora, strict=True):
        if BLEND in dataset.manifest.inputs:
            raise CorpusError(
                f"data.blend: {name} is a blend itself: name the stores it is made of"
            )
        if not dataset.manifest.complete:
            raise CorpusError(
                f"data.blend: {name} is not complete yet: run jobs/prepare.py with its recipe first"
            )
        if names.count(name) > 1:
            raise CorpusError(
                f"data.blend: {name} is named twice: name it once, with its whole weight"
            )
        if dataset.manifest.tokenizer != first.tokenizer:
            raise CorpusError(
                f"data.blend: {name} has another tokenizer than {names[0]}: prepare it again with the first one's "
                "tokenizer.json as data.tokenizer"
            )
    return {
        BLEND: [
            {"store": name, "weight": one.weight, "fingerprint": dataset.manifest.fingerprint}
            for name, one, dataset in zip(names, stores, corpora, strict=True)
        ]
    }


def write_blend(folder: Path, inputs: Mapping[str, Any]) -> Manifest:
    """Write a blend's tokenizer and manifest into an empty folder; `inputs` are those of `blend_inputs`."""
    entries = inputs[BLEND]
    corpora = [open_dataset(local_store(e["store"], e["fingerprint"])) for e in entries]
    tokenizer = folder / "tokenizer.json"
    shutil.copyfile(corpora[0].tokenizer_file, tokenizer)
    parts = {
        f"store {number}, weight {entry['weight']!r}": str(entry["fingerprint"])
        for number, entry in enumerate(entries)
    }
    manifest = Manifest(
        inputs=inputs,
        vocabulary=corpora[0].vocabulary,
        train=_sum(dataset.manifest.train for dataset in corpora),
        held_out=_sum(dataset.manifest.held_out for dataset in corpora),
        files={tokenizer.name: digest(tokenizer), **parts},
    )
    manifest.write(folder)
    return manifest


def _sum(splits: Iterable[Split]) -> Split:
    counts = [astuple(split) for split in splits]
    return Split(*map(sum, zip(*counts, strict=True)))
