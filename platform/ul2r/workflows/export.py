"""From a run's last checkpoint to a folder that others load, and to the registry."""

from __future__ import annotations

from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import CheckpointError
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.checkpoint_reader import (
    MegatronCheckpointReader,
    compute_foreign_identity,
    find_latest_iteration,
)
from ul2r.model.huggingface.exporting import convert_tensors, write_export
from ul2r.model.sizing import GIB
from ul2r.tracking.mlflow import check_server, find_run, register
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.metadata import INFO_FILE, CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore, latest_valid
from ul2r.workflows.model_card import write_card


def export(recipe: Recipe) -> Path:
    """Write a checkpoint as a Hugging Face folder, and register it if the recipe says so.

    It is the run's last sound one, and the folder "export", unless `export.checkpoint` names another, whose folder is
    named after it. An export of the same checkpoint that is there already is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged or one of another model.
        ServiceError: If it is to be registered and the tracking server fails.
    """
    dataset = open_dataset(recipe.storage_paths.store)
    rows = recipe.model.num_used_embeddings(dataset.vocabulary.size)
    checkpoint, folder = _named(recipe)
    uri = check_server(recipe.tracking.uri) if recipe.export.registered_model else None
    stored = MegatronCheckpointReader(checkpoint)
    stored.check(recipe.model, rows)
    metadata = _describe(recipe, dataset, checkpoint)
    if not metadata.is_written_in(folder):
        write_export(
            folder,
            convert_tensors(stored, recipe.model, rows),
            architecture=recipe.model,
            max_positions=recipe.objective.sequence_length,
            metadata=metadata,
            tokenizer=dataset.tokenizer_file,
            shard_bytes=int(recipe.export.max_shard_gib * GIB),
        )
    write_card(folder, recipe, dataset, metadata)
    if uri is not None:
        _register(recipe, uri, folder)
    return folder


def _named(recipe: Recipe) -> tuple[Path, Path]:
    """The checkpoint to export, and where to."""
    exports, chosen = recipe.paths.export, recipe.export.checkpoint
    if chosen is None:
        last = latest_valid(CheckpointStore.from_recipe(recipe))
        if last is None:
            raise CheckpointError(
                f"run {recipe.name!r} has no checkpoint in {recipe.paths.folder}: train it first with jobs/train.py"
            )
        return last, exports
    if not (chosen / INFO_FILE).is_file():
        chosen = find_latest_iteration(chosen, "export.checkpoint")
    elif damage := find_damage(chosen):
        raise CheckpointError(f"export.checkpoint={chosen}: {damage}: name another one")
    return chosen, exports.with_name(f"{exports.name}-{chosen.name}")


def _describe(recipe: Recipe, dataset: TokenDataset, checkpoint: Path) -> ExportMetadata:
    """Describe the export of a checkpoint; one written by Megatron-LM records no step and no denoisers."""
    if not (checkpoint / INFO_FILE).is_file():
        return ExportMetadata(
            run=recipe.name,
            step=0,
            tokens=0,
            flops=0.0,
            checkpoint=compute_foreign_identity(checkpoint),
            vocabulary=dataset.vocabulary,
        )

    info = CheckpointInfo.read(checkpoint)
    info.check_same_model(recipe, dataset)
    return ExportMetadata(
        run=recipe.name,
        role=recipe.role,
        attention="causal" if recipe.objective.is_causal else "prefix",
        denoising=recipe.objective.is_denoising,
        step=info.step,
        tokens=info.tokens,
        flops=info.flops,
        checkpoint=info.checkpoint_id,
        vocabulary=dataset.vocabulary,
    )


def _register(recipe: Recipe, uri: str, folder: Path) -> None:
    run_id = find_run(uri, recipe.paths.folder)
    if run_id is None:
        raise CheckpointError(
            f"run {recipe.name!r} is not known to MLflow at {uri}: set tracking.uri to the server it was trained with"
        )
    assert recipe.export.registered_model is not None
    register(uri, recipe.export.registered_model, folder, run_id, recipe.export.alias)
