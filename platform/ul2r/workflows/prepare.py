"""Make a recipe's token store unless it exists."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

from ul2r.config import Recipe
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.pairs import load_finished_pairs, prepare_pairs
from ul2r.data.prepare.prepare import load_finished, prepare
from ul2r.data.prepare.round_trip import RoundTrip
from ul2r.data.sampling.batches import describe_unfit_pairs
from ul2r.data.sampling.held_out_windows import describe_small_split
from ul2r.data.store.dataset import open_dataset, open_run_dataset
from ul2r.data.store.manifest import Manifest
from ul2r.data.store.pair_store import find_pairs_folder
from ul2r.environment import has_ray_cluster
from ul2r.launch.disk_space import check_store_space
from ul2r.launch.preflight import check_infilling, planned_vocabulary

logger = logging.getLogger(__name__)


def prepare_store(recipe: Recipe) -> tuple[Manifest, bool]:
    """Make the recipe's token store, on the Ray cluster at hand or in processes of this machine, unless it exists.

    Its pairs are made as well, if it has some.

    Returns:
        The store's manifest, and whether the store was made just now.

    Raises:
        UserError: If the text or storage cannot be used, or a store of other text is in the way.
    """
    if recipe.data.pairs:
        # First of all: that their files are there, before text is tokenized for hours.
        load_finished_pairs(recipe)
    manifest = load_finished(recipe)
    is_new = manifest is None
    if manifest is None:
        manifest = _prepare_text(recipe)
    if recipe.data.pairs:
        prepare_pairs(recipe)
    return manifest, is_new


def _prepare_text(recipe: Recipe) -> Manifest:
    check_infilling(recipe)
    check_store_space(recipe, planned_vocabulary(recipe))
    # A blend only lists stores that exist: nothing to tokenize, so no cluster.
    with nullcontext() if recipe.data.blend else _connect_cluster():
        manifest = prepare(recipe)
    if warning := describe_small_split(recipe, open_dataset(recipe.storage_paths.store)):
        logger.warning("%s", warning)
    return manifest


def _connect_cluster() -> AbstractContextManager[None]:
    """Connect to the Ray cluster that the environment names, if it names one."""
    if not has_ray_cluster():
        return nullcontext()
    # Here, since Ray takes seconds to import and may be absent.
    from ul2r.launch.ray_train.cluster import connect_ray

    return connect_ray(cpus=1)


def describe_manifest(manifest: Manifest) -> str:
    """Return text to print: counts of a store's two splits, of its vocabulary and of what it lacks, a line each."""
    lines = []
    for name, split in (("train", manifest.train), ("held out", manifest.held_out)):
        line = f"  {name:<9} {split.num_documents:,} documents, {split.num_tokens:,} tokens"
        if split.text_bytes:
            line += (
                f", {split.text_bytes / 1e6:.2f} MB of text"
                f" ({split.num_tokens / split.text_bytes:.3f} tokens per byte)"
            )
        lines.append(line)

    vocabulary = manifest.vocabulary
    lines.append(
        f"  tokenizer {vocabulary.size:,} entries, including {len(vocabulary.sentinels)} sentinels"
    )

    if manifest.round_trip:
        lines.append(f"  tokenizer {RoundTrip.from_dict(manifest.round_trip).describe()}")
    if manifest.left_out:
        lines.append(f"  left out  {LeftOut.from_dict(manifest.left_out).describe()}")

    return "\n".join(lines)


def describe_pairs(recipe: Recipe) -> str:
    """Return text to print: counts of a recipe's pairs, and what of them is left out or cut in its rows."""
    dataset = open_run_dataset(recipe)
    assert dataset.pairs is not None, "data.pairs is empty"
    manifest = dataset.pairs.manifest
    lines = [f"pairs {find_pairs_folder(recipe)}"]
    for name, split in (("train", manifest.train), ("held out", manifest.held_out)):
        lines.append(
            f"  {name:<9} {split.num_documents:,} pairs, {split.num_tokens:,} tokens, "
            f"{split.text_bytes / 1e6:.2f} MB of text"
        )
    if manifest.left_out:
        lines.append(f"  left out  {LeftOut.from_dict(manifest.left_out).describe()}")
    if unfit := describe_unfit_pairs(recipe, dataset):
        lines.append(f"  too long  {unfit}")
    return "\n".join(lines)
