"""Runs whose base was trained again since they began: what they show is not of the base as it is."""

from __future__ import annotations

from ul2r.config import Recipe
from ul2r.errors import CheckpointError
from ul2r.inference import ExportMetadata, read_export_metadata
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore


def check_base(recipe: Recipe) -> None:
    """Refuse a run that began with other weights than those that its base has now.

    Raises:
        CheckpointError: If it did.
    """
    if not is_base_current(recipe):
        raise CheckpointError(
            f"run {recipe.name!r} began with weights that its base {recipe.base!r} no longer has, since that was "
            f"trained again: remove {recipe.paths.folder} and rerun"
        )


def is_base_current(recipe: Recipe) -> bool:
    """Return whether a run began with the weights of its base's export, or continues no run."""
    if not isinstance(recipe.base, str):
        return True
    export = recipe.storage_paths.run(recipe.base).export
    return not has_other_base(recipe, read_export_metadata(export))


def has_other_base(recipe: Recipe, base: ExportMetadata) -> bool:
    """Return whether a run began with another checkpoint than its base's export is of, as far as both are known."""
    # A run that began with a folder has recorded a digest of that, even if the folder is an export of this project.
    if not isinstance(recipe.base, str):
        return False
    began = _find_base_id(recipe)
    return began is not None and base.checkpoint is not None and began != base.checkpoint


def _find_base_id(recipe: Recipe) -> str | None:
    """Return the checkpoint that a run began with, by its newest one that can be read; None if there is none."""
    for folder in CheckpointStore.from_recipe(recipe).list_checkpoints():
        try:
            return CheckpointInfo.read(folder).base_id
        except CheckpointError:
            continue  # a damaged one, which a resumed run skips as well
    return None
