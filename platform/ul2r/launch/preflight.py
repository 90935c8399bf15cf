"""What surrounds a run's training, whoever starts its workers: the checks before it, its record in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ul2r.config import Parallel, Recipe
from ul2r.data.inspection import write_page
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer
from ul2r.launch.pretrained import check_base
from ul2r.model.flops import num_parameters
from ul2r.model.huggingface.config_json import check_family
from ul2r.model.sizing import check_memory
from ul2r.tracking.mlflow import find_run, finish_run, log_artifact, start_run
from ul2r.tracking.tracker import RunStatus
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore, find_base_checkpoint, latest_valid

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For workers that asked for no GPU, on a machine that has some."""


def gpu_environment(parallel: Parallel) -> dict[str, str]:
    """Environment of a worker with a GPU, set before CUDA starts.

    Megatron-Core's tensor-parallel layers ask for one connection: what they send is then queued before the product
    that it overlaps with.
    """
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if parallel.tensor > 1 else {}


def check_run(recipe: Recipe, dataset: TokenDataset) -> CheckpointInfo | None:
    """Check a recipe against its store, its checkpoints and its devices.

    Args:
        recipe: The run.
        dataset: What it is trained on.

    Returns:
        What the run's last sound checkpoint says, None before the first.

    Raises:
        UserError: If one of the checks fails.
    """
    BatchBuilder(recipe, dataset)  # refuses a store that is too short or has too few sentinels
    check_family(recipe.model)
    check_memory(recipe, dataset.vocabulary.size)
    return check_checkpoints(recipe, dataset)


def check_unprepared(recipe: Recipe) -> None:
    """Check what can be checked of a recipe whose store is not there yet.

    Raises:
        UserError: If its devices cannot hold the run, or it names a base that is not there.
    """
    check_memory(recipe, planned_vocabulary(recipe))
    find_base_checkpoint(recipe)


def planned_vocabulary(recipe: Recipe) -> int:
    """Entries that the tokenizer of a store that is not there yet will have."""
    data = recipe.data
    if data.tokenizer is None:
        return data.vocabulary_size
    tokenizer = assign_special_tokens(
        load_tokenizer(data.tokenizer), data.num_sentinels, data.mode_tokens, data.special_tokens
    )
    return build_vocabulary(tokenizer, data.mode_tokens).size


def check_checkpoints(recipe: Recipe, dataset: TokenDataset) -> CheckpointInfo | None:
    """What the run's last sound checkpoint says, None before the first.

    One that the run goes on from is read by the workers, all at once, so only its small files are read here; one
    that ends the run is read wholly.

    Raises:
        CheckpointError: If it, or before it the base's, is damaged or differs from the recipe.
    """
    store = CheckpointStore.from_recipe(recipe)
    own = latest_valid(store, thorough=False, quiet=True)
    if own is not None and CheckpointInfo.read(own).is_finished:
        own = latest_valid(store, quiet=True)
    if own is not None:
        info = CheckpointInfo.read(own)
        info.check_same_run(recipe, dataset)
        return info
    check_base(recipe, dataset)
    base = find_base_checkpoint(recipe, partial(latest_valid, thorough=False, quiet=True))
    if base is not None:
        CheckpointInfo.read(base).check_same_model(recipe, dataset)
    return None


def latest_checkpoint_info(recipe: Recipe) -> CheckpointInfo:
    """The last checkpoint of a run that was trained just now."""
    path = latest_valid(CheckpointStore.from_recipe(recipe), thorough=False)
    assert path is not None
    return CheckpointInfo.read(path)


def mark_finished(recipe: Recipe, uri: str) -> None:
    """Let MLflow know of a run that its last checkpoint says is finished: it may have been killed before it could."""
    run_id = find_run(uri, recipe.paths.folder)
    if run_id is not None:
        finish_run(uri, run_id, recipe.paths.folder, "FINISHED")


@contextmanager
def track_run(recipe: Recipe, dataset: TokenDataset, uri: str) -> Iterator[str]:
    """The run in MLflow, begun or gone on with, while the block trains it; it ends as the block does.

    Args:
        recipe: The run.
        dataset: What it is trained on.
        uri: MLflow's address.

    Yields:
        MLflow's name of the run.
    """
    run_id = start_run(
        recipe,
        uri,
        tags={"ul2r.data": dataset.manifest.fingerprint},
        params=_parameters(recipe, dataset),
    )
    status: RunStatus = "FAILED"
    try:
        log_artifact(uri, run_id, write_page(recipe, dataset))
        yield run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        finish_run(uri, run_id, recipe.paths.folder, status)


def _parameters(recipe: Recipe, dataset: TokenDataset) -> dict[str, str | int | float]:
    """What people sort and filter runs by."""
    return {
        "mixture": ", ".join(f"{d.name} {d.weight:g}" for d in recipe.objective.mixture),
        "sequence_length": recipe.objective.sequence_length,
        "parameters": num_parameters(recipe.model, dataset.vocabulary.size),
        "steps": recipe.training.steps,
        "global_batch_size": recipe.training.global_batch_size,
        "learning_rate": recipe.optimizer.learning_rate,
        "tensor": recipe.parallel.tensor,
        "pipeline": recipe.parallel.pipeline,
        "data": recipe.parallel.data,
        "seed": recipe.seed,
    }
