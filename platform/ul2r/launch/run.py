"""What surrounds a run's training, whoever starts its workers: the checks before it, its record in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ul2r.config import Recipe
from ul2r.data.batches import Batches
from ul2r.data.inspection import write_page
from ul2r.data.prepared import Corpus
from ul2r.launch.base import check_base
from ul2r.model.flops import parameters
from ul2r.model.huggingface.configuration import check_family
from ul2r.model.sizing import size_run
from ul2r.tracking.mlflow import end_run, find_run, log_artifact, start_run
from ul2r.tracking.tracker import RunStatus
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore, base_checkpoint

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For workers that asked for no GPU, on a machine that has some."""


def check_run(recipe: Recipe, corpus: Corpus) -> CheckpointInfo | None:
    """Check a recipe against its store, its checkpoints and its devices.

    Returns:
        What the run's last checkpoint says, None before the first.

    Raises:
        UserError: If one of the checks fails.
    """
    Batches(recipe, corpus)  # refuses a store that is too short or has too few sentinels
    check_family(recipe.model)
    size_run(recipe, corpus.vocabulary.size)  # refuses what its devices cannot hold
    return check_checkpoints(recipe, corpus)


def check_checkpoints(recipe: Recipe, corpus: Corpus) -> CheckpointInfo | None:
    """What the run's last checkpoint says, None before the first.

    Raises:
        CheckpointError: If it, or before it the base's, differs from the recipe.
    """
    checkpoints = recipe.run_folder() / "checkpoints"
    own = CheckpointStore(checkpoints).latest()
    if own is not None:
        info = CheckpointInfo.read(own)
        info.check_same_run(recipe, corpus)
        return info
    check_base(recipe, corpus)
    base = base_checkpoint(recipe)
    if base is not None:
        CheckpointInfo.read(base).check_same_model(recipe, corpus)
    return None


def check_finished(recipe: Recipe, corpus: Corpus) -> CheckpointInfo:
    """The last checkpoint of a run that was trained to its end."""
    info = check_checkpoints(recipe, corpus)
    assert info is not None
    assert info.finished
    return info


def end_finished(recipe: Recipe, uri: str) -> None:
    """Let MLflow know of a run that its last checkpoint says is finished: it may have been killed before it could."""
    run_id = find_run(uri, recipe.run_folder())
    if run_id is not None:
        end_run(uri, run_id, "FINISHED")


@contextmanager
def recorded(recipe: Recipe, corpus: Corpus, uri: str) -> Iterator[str]:
    """The run in MLflow, begun or gone on with, while the block trains it; it ends as the block does.

    Args:
        recipe: The run.
        corpus: What it is trained on.
        uri: MLflow's address.

    Yields:
        MLflow's name of the run.
    """
    run_id = start_run(
        recipe,
        uri,
        tags={"ul2r.data": corpus.manifest.fingerprint},
        params=_parameters(recipe, corpus),
    )
    status: RunStatus = "FAILED"
    try:
        log_artifact(uri, run_id, write_page(recipe, corpus))
        yield run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        end_run(uri, run_id, status)


def _parameters(recipe: Recipe, corpus: Corpus) -> dict[str, str | int | float]:
    """What people sort and filter runs by."""
    return {
        "mixture": ", ".join(f"{d.name} {d.weight:g}" for d in recipe.objective.mixture),
        "sequence_length": recipe.objective.sequence_length,
        "parameters": parameters(recipe.model, corpus.vocabulary.size),
        "steps": recipe.training.steps,
        "global_batch_rows": recipe.training.global_batch_rows,
        "learning_rate": recipe.optimizer.learning_rate,
        "tensor": recipe.parallel.tensor,
        "pipeline": recipe.parallel.pipeline,
        "data": recipe.parallel.data,
        "seed": recipe.seed,
    }
