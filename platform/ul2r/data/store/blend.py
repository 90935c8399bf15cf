"""Blends: store folders with a manifest and a tokenizer but no tokens, which stay in the stores that they name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from ul2r.config import WeightedStore
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.data.store.manifest import BLEND_KEY, Manifest
from ul2r.data.store.remote import fetch_store
from ul2r.errors import CorpusError
from ul2r.filesystem import sha256_of
from ul2r.paths import TOKENIZER_FILE

BLOCK = 10_000
"""Samples in which every store has its exact share."""
MAX_STREAMED_STORES = 2**7
"""First stores of a blend, which may be streamed: a shuffle has 15 bits for its source, and 8 count the segments."""


def allocate_samples(weights: Sequence[float]) -> list[int]:
    """Allocate the `BLOCK` samples of a block to stores in proportion to their weights.

    Shares are rounded down; the samples left over go to those that lost most by it.

    Raises:
        CorpusError: If a weight is too small for a single sample.
    """
    exact = [weight / math.fsum(weights) * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    # Ties go to the first store, so that every machine allocates the same samples.
    by_loss = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_loss[: BLOCK - sum(counts)]:
        counts[i] += 1

    if 0 in counts:
        small = counts.index(0)
        raise CorpusError(
            f"data.blend.{small}.weight={weights[small]:g} of {math.fsum(weights):g} is less than one sample in "
            f"{BLOCK}: raise it, or leave the store out"
        )
    return counts


def collect_blend_inputs(stores: Sequence[WeightedStore]) -> dict[str, Any]:
    """Return the inputs of a blend's manifest as plain JSON values.

    Raises:
        CorpusError: If a store is missing, a blend itself, incomplete or named twice, or has another tokenizer than
            the first; or if a weight is too small for a single sample in a block.
    """
    # For its check only, before any store is downloaded.
    allocate_samples([store.weight for store in stores])
    names = [store.store for store in stores]
    datasets = [open_dataset(fetch_store(name)) for name in names]
    check_streamed_members(names, datasets)
    _check_members(names, datasets)
    return {
        BLEND_KEY: [
            {
                "store": store.store,
                "weight": store.weight,
                "fingerprint": dataset.manifest.fingerprint,
            }
            for store, dataset in zip(stores, datasets, strict=True)
        ]
    }


def check_streamed_members(names: Sequence[str], datasets: Sequence[TokenDataset]) -> None:
    """Check that the streamed stores of a blend are among those whose segments can be numbered.

    Raises:
        CorpusError: If one is not.
    """
    for number, (name, dataset) in enumerate(zip(names, datasets, strict=True)):
        if number >= MAX_STREAMED_STORES and dataset.manifest.segments:
            raise CorpusError(
                f"data.blend.{number}: {name} was prepared with data.order=streamed, and only the first "
                f"{MAX_STREAMED_STORES} stores of a blend may be: list it among them"
            )


def _check_members(names: Sequence[str], datasets: Sequence[TokenDataset]) -> None:
    # By fingerprint and not by name: a link, another spelling of a path or a URL may lead to the same store.
    first_names: dict[str, str] = {}
    for name, dataset in zip(names, datasets, strict=True):
        if BLEND_KEY in dataset.manifest.inputs:
            raise CorpusError(f"data.blend: {name} is itself a blend: list its stores instead")
        if not dataset.manifest.is_complete:
            raise CorpusError(
                f"data.blend: {name} is not complete yet: run `ul2r prepare` with its recipe first"
            )
        fingerprint = dataset.manifest.fingerprint
        if fingerprint in first_names:
            first = first_names[fingerprint]
            other_name = "" if first == name else f", it is the same store as {first}"
            raise CorpusError(
                f"data.blend: {name} is listed twice{other_name}: list it once, with its whole weight"
            )
        first_names[fingerprint] = name
        if dataset.manifest.tokenizer != datasets[0].manifest.tokenizer:
            raise CorpusError(
                f"data.blend: {name} has another tokenizer than {names[0]}: prepare it again with the tokenizer.json "
                "of the first as data.tokenizer"
            )


def write_blend(folder: Path, inputs: Mapping[str, Any]) -> Manifest:
    """Write a blend's tokenizer and manifest into an empty folder; `inputs` come from `collect_blend_inputs`."""
    entries = inputs[BLEND_KEY]
    datasets = [open_dataset(fetch_store(e["store"], e["fingerprint"])) for e in entries]
    tokenizer = folder / TOKENIZER_FILE
    shutil.copyfile(datasets[0].tokenizer_file, tokenizer)

    # The fingerprint is a digest of `files`: these entries make it depend on the stores and their weights.
    members = {
        # repr keeps all digits of the weight, so that no two different weights give the same fingerprint.
        f"store {number}, weight {entry['weight']!r}": str(entry["fingerprint"])
        for number, entry in enumerate(entries)
    }
    manifest = Manifest(
        inputs=inputs,
        vocabulary=datasets[0].vocabulary,
        train=reduce(add, (dataset.manifest.train for dataset in datasets)),
        held_out=reduce(add, (dataset.manifest.held_out for dataset in datasets)),
        files={TOKENIZER_FILE: sha256_of(tokenizer), **members},
    )
    manifest.write(folder)
    return manifest
