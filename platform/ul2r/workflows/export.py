"""From a run's checkpoint to a Hugging Face folder, and to the model registry."""

from __future__ import annotations

import logging
from pathlib import Path

from ul2r.config import Architecture, Recipe
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.errors import CheckpointError, ServiceError
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.checkpoint_reader import (
    MegatronCheckpointReader,
    compute_foreign_identity,
    find_latest_iteration,
)
from ul2r.model.huggingface.config_json import find_changed_setting, read_architecture
from ul2r.model.huggingface.exporting import convert_tensors, write_export
from ul2r.model.sizing import GIB
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.layout import INFO_FILE
from ul2r.train.checkpoint.lineage import list_uses
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore, latest_valid
from ul2r.workflows.export_files import write_export_files
from ul2r.workflows.log_export import find_server, log_export
from ul2r.workflows.model_card import write_card
from ul2r.workflows.push_to_hub import find_hub_target, push_export

logger = logging.getLogger(__name__)


def export(recipe: Recipe) -> Path:
    """Write a checkpoint as a Hugging Face folder, log it in MLflow, see `log_export`, and push it to the Hub.

    The checkpoint is the run's last valid one and the folder is "export", unless `export.checkpoint` names another,
    whose folder is named after it. An existing export of the same checkpoint is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or it belongs to another model.
        RecipeError: If it is to be registered without a tracking server.
        ServiceError: If it is to be registered and the tracking server fails, or pushed and the Hub does.
    """
    dataset = open_run_dataset(recipe)
    checkpoint, folder = _choose_checkpoint(recipe)
    # Before the weights are written, which can take long: that the servers answer.
    server = find_server(recipe)
    target = find_hub_target(recipe)

    _write_export(recipe, dataset, checkpoint, folder)
    if server is not None:
        try:
            log_export(recipe, server, folder)
        except ServiceError as error:
            # The export itself is complete, and nothing was to be registered.
            if recipe.export.registered_model is not None:
                raise
            logger.warning("%s: the export is not logged in MLflow: %s", recipe.name, error)
    if target is not None:
        logger.info("%s: pushed to %s", recipe.name, push_export(folder, target))

    return folder


def _choose_checkpoint(recipe: Recipe) -> tuple[Path, Path]:
    """Return the checkpoint to export and the folder to export it to."""
    folder = recipe.paths.export
    checkpoint = recipe.export.checkpoint

    if checkpoint is None:
        last = latest_valid(CheckpointStore.from_recipe(recipe))
        if last is None:
            raise CheckpointError(
                f"run {recipe.name!r} has no checkpoint in {recipe.paths.folder}: train it first with `ul2r train`"
            )
        return last, folder

    # Only checkpoints of this project have a description; others are looked up by Megatron-LM's own layout.
    if not (checkpoint / INFO_FILE).is_file():
        checkpoint = find_latest_iteration(checkpoint, "export.checkpoint")
    elif damage := find_damage(checkpoint):
        raise CheckpointError(f"export.checkpoint={checkpoint}: {damage}: name another checkpoint")

    return checkpoint, folder.with_name(f"{folder.name}-{checkpoint.name}")


def _write_export(recipe: Recipe, dataset: TokenDataset, checkpoint: Path, folder: Path) -> None:
    """Write weights, tokenizer and metadata unless the folder has those of the checkpoint, and the files on its use."""
    # Without the rows that training added to make the embedding divisible.
    rows = recipe.model.num_used_embeddings(dataset.vocabulary.size)
    reader = MegatronCheckpointReader(checkpoint)
    reader.check(recipe.model, rows)
    metadata = _make_metadata(recipe, dataset, checkpoint)

    # The metadata names the checkpoint, so the same folder is not written twice.
    if not (metadata.is_written_in(folder) and _is_read_as(folder, recipe.model)):
        write_export(
            folder,
            convert_tensors(reader, recipe.model, rows),
            architecture=recipe.model,
            max_positions=recipe.objective.sequence_length,
            metadata=metadata,
            tokenizer=dataset.tokenizer_file,
            shard_bytes=int(recipe.export.max_shard_gib * GIB),
        )
    # Even for an export that is kept: it may be an older version's, and its scores may be new.
    write_export_files(folder, recipe, dataset, metadata)
    write_card(folder, recipe, dataset, metadata)


def _is_read_as(folder: Path, architecture: Architecture) -> bool:
    """Return whether an export's config.json describes the model; older versions left out settings of some families."""
    try:
        return find_changed_setting(architecture, read_architecture(folder)) is None
    except CheckpointError:
        return False


def _make_metadata(recipe: Recipe, dataset: TokenDataset, checkpoint: Path) -> ExportMetadata:
    """Return an export's metadata; a checkpoint of Megatron-LM has no record of its training."""
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
    # The recipe may have been edited since the checkpoint was written.
    info.check_same_model(recipe, dataset)

    return ExportMetadata(
        run=recipe.name,
        role=recipe.role,
        attention="causal" if recipe.objective.is_causal else "prefix",
        denoising=recipe.objective.is_denoising,
        eos_after_inputs=recipe.objective.eos_after_inputs,
        prefix_sentinel=recipe.objective.is_prefix_closed_by_sentinel,
        fim=recipe.objective.has_fim,
        step=info.step,
        tokens=info.tokens,
        flops=info.flops,
        checkpoint=info.checkpoint_id,
        vocabulary=dataset.vocabulary,
        # A checkpoint of an older version has no record of its own, and neither has its export.
        data=[use.to_dict() for use in list_uses(info, recipe)] if info.data else None,
    )
