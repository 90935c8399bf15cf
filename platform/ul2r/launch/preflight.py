"""Checks before a run starts, and its record while it trains, whoever starts the workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ul2r.config import Parallel, Recipe
from ul2r.config.evaluation import check_infill_length
from ul2r.config.recorded_recipe import record_recipe
from ul2r.data.inspection import write_page
from ul2r.data.sampling.batches import check_dataset, describe_unfit_pairs
from ul2r.data.sampling.held_out_windows import check_held_out, describe_small_split
from ul2r.data.sampling.order import DataPlan
from ul2r.data.special_tokens import assign_special_tokens
from ul2r.data.store.dataset import TokenDataset, run_fingerprint
from ul2r.data.tokenizer import build_vocabulary, load_tokenizer
from ul2r.errors import RunInterrupted
from ul2r.launch.disk_space import check_run_space
from ul2r.launch.pretrained import check_base
from ul2r.launch.run_inputs import list_run_inputs
from ul2r.model.flops import num_parameters
from ul2r.model.sizing import check_memory
from ul2r.tracking.names import check_denoiser_names
from ul2r.tracking.store import TrackingStore
from ul2r.tracking.tracker import RunStatus
from ul2r.train.checkpoint.copying import CheckpointCopies
from ul2r.train.checkpoint.lineage import plan_data
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import (
    CheckpointStore,
    find_base_checkpoint,
    latest_valid,
    read_writer_token,
)

logger = logging.getLogger(__name__)

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of workers that asked for no GPU, on a machine that has some."""


def gpu_environment(parallel: Parallel) -> dict[str, str]:
    """Return the environment of a worker with a GPU, which must be set before CUDA starts.

    Megatron-Core's tensor-parallel layers ask for one connection: communication is then queued ahead of the matrix
    product that it overlaps with.
    """
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if parallel.tensor > 1 else {}


def check_run(recipe: Recipe, dataset: TokenDataset, resumed: CheckpointInfo | None) -> None:
    """Check a recipe against its token store, its devices, its disk and the weights that it starts from.

    `train.trial_build` checks its model, in a process of its own.

    Args:
        recipe: The run.
        dataset: Its token store.
        resumed: Checkpoint that it resumes from, as `find_resume_checkpoint` returns it.

    Raises:
        UserError: If a check fails.
    """
    # Files of a base are looked at last: they may be large, or have to be fetched first.
    check_dataset(recipe, dataset)
    if resumed is None:
        check_names(recipe)
        check_infilling(recipe, max(map(len, dataset.vocabulary.modes.values())))
        check_held_out(recipe, dataset)
    check_memory(recipe, dataset.vocabulary.size)
    # A finished run writes nothing.
    if resumed is None or not has_finished(recipe, resumed):
        check_run_space(recipe, dataset.vocabulary.size)
    check_initial_weights(recipe, dataset, resumed)
    # Last, so that a run that is refused has one line.
    for warning in (describe_small_split(recipe, dataset), describe_unfit_pairs(recipe, dataset)):
        if warning:
            logger.warning("%s", warning)


def check_names(recipe: Recipe) -> None:
    """Check that the losses of a new run's denoisers can be recorded under their names.

    Raises:
        RecipeError: If one of them cannot.
    """
    check_denoiser_names(recipe.objective.mixture, "objective.mixture")
    check_denoiser_names(recipe.evaluation.mixture, "evaluation.mixture")


def check_infilling(recipe: Recipe, num_mode_tokens: int = 1) -> None:
    """Check that a new run's export can be measured at infilling, as a comparison does at the end.

    Args:
        recipe: The run.
        num_mode_tokens: Tokens of the longest mode; before there is a token store, the fewest.

    Raises:
        RecipeError: If an infilling example is longer than a slot.
    """
    num_other_tokens = num_mode_tokens + recipe.objective.eos_after_inputs
    check_infill_length(recipe.evaluation, recipe.objective, num_other_tokens)


def check_initial_weights(
    recipe: Recipe, dataset: TokenDataset, resumed: CheckpointInfo | None
) -> None:
    """Check the weights that a run starts from: those of its checkpoint if it has one, else those of its base.

    Raises:
        CheckpointError: If they are missing, damaged or of another model.
        RecipeError: If a Hugging Face base has other tokens than the token store, or the run is to go on in its base's
            text and cannot.
    """
    if resumed is not None:
        resumed.check_same_run(recipe, dataset)
        return
    check_base(recipe, dataset)
    check_base_run(recipe, dataset)
    plan_run_data(recipe, dataset, resumed)


def plan_run_data(
    recipe: Recipe, dataset: TokenDataset, resumed: CheckpointInfo | None
) -> DataPlan:
    """Return the order in which the run reads its text, as its workers will find it.

    Args:
        recipe: The run.
        dataset: Its token store.
        resumed: Checkpoint that it resumes from, as `find_resume_checkpoint` returns it.

    Raises:
        CheckpointError: If the run's base has no valid checkpoint.
        RecipeError: If the run is to go on where its base stopped, and that cannot be.
    """
    base = None
    if resumed is None:
        base = find_base_checkpoint(recipe, partial(latest_valid, thorough=False, quiet=True))
    info = CheckpointInfo.read(base) if base is not None else None
    return plan_data(recipe, dataset, resumed, info)


def check_unprepared(recipe: Recipe) -> None:
    """Check what can be checked of a recipe whose token store does not exist yet.

    Raises:
        UserError: If its devices or its disk cannot hold the run, or its base is missing.
    """
    check_names(recipe)
    check_infilling(recipe)
    # The only sizes known before there is a store are those that the recipe gives.
    vocabulary_size = planned_vocabulary(recipe)
    check_memory(recipe, vocabulary_size)
    check_run_space(recipe, vocabulary_size)
    find_base_checkpoint(recipe, partial(latest_valid, thorough=False, quiet=True))


def check_base_run(recipe: Recipe, dataset: TokenDataset) -> None:
    """Check the last checkpoint of the run that a recipe names as its base, if it names one.

    Raises:
        CheckpointError: If it is missing, damaged or holds another model.
    """
    base = find_base_checkpoint(recipe, partial(latest_valid, thorough=False, quiet=True))
    if base is not None:
        CheckpointInfo.read(base).check_same_model(recipe, dataset)


def planned_vocabulary(recipe: Recipe) -> int:
    """Return the size that the tokenizer of a store will have which does not exist yet."""
    data = recipe.data
    if data.tokenizer is None:
        return data.vocabulary_size
    tokenizer = assign_special_tokens(
        load_tokenizer(data.tokenizer), data.num_sentinels, data.mode_tokens, data.special_tokens
    )
    return build_vocabulary(tokenizer, data.mode_tokens).size


def find_resume_checkpoint(recipe: Recipe) -> CheckpointInfo | None:
    """Return the metadata of the run's last valid checkpoint, None before the first.

    Damage that is passed over is not logged: the workers meet it again and report it.

    Raises:
        CheckpointError: If there are checkpoints and none is valid.
    """
    store = CheckpointStore.from_recipe(recipe)
    # Workers verify the checkpoint that they resume from, each its part, so that only sizes are compared here. The last
    # checkpoint of a finished run has no other reader and is verified as a whole.
    path = latest_valid(store, thorough=False, quiet=True)
    if path is not None and has_finished(recipe, CheckpointInfo.read(path)):
        path = latest_valid(store, quiet=True)
    return CheckpointInfo.read(path) if path is not None else None


def has_finished(recipe: Recipe, info: CheckpointInfo) -> bool:
    """Return whether a checkpoint of the run is its last one; one of a run that is to be prolonged is not."""
    return info.step >= recipe.training.steps


def final_checkpoint_info(recipe: Recipe) -> CheckpointInfo:
    """Return the metadata of the last checkpoint of a run that was just trained.

    Raises:
        RunInterrupted: If the run was asked to stop before its last step.
    """
    path = latest_valid(CheckpointStore.from_recipe(recipe), thorough=False)
    assert path is not None, "a run that ends without an error has saved"
    info = CheckpointInfo.read(path)
    if not has_finished(recipe, info):
        raise RunInterrupted(
            f"{recipe.name}: stopped after step {info.step} of {recipe.training.steps}, checkpoint saved"
        )
    return info


def mark_finished(recipe: Recipe, store: TrackingStore) -> None:
    """Do what a finished run may have been killed before: copy its last checkpoint, record its status.

    Raises:
        CheckpointError: If the checkpoint cannot be copied.
    """
    copy_last_checkpoint(recipe)
    run_id = store.find_run(recipe.paths.folder)
    if run_id is not None:
        store.finish_run(run_id, recipe.paths.folder, "FINISHED")
        _log_page(recipe, store.find_page(run_id))


def copy_last_checkpoint(recipe: Recipe) -> None:
    """Copy the last checkpoint of a finished run to its remote folder, if the recipe has one, unless it is there.

    Raises:
        CheckpointError: If it cannot be copied, or the folder has the copies of a run in another storage.
    """
    if recipe.checkpoints.remote_dir is None:
        return
    token = read_writer_token(recipe.paths.checkpoints)
    store = CheckpointStore.from_recipe(recipe, writer_token=token)
    assert store.remote is not None
    last = store.list_checkpoints()[0]
    store.remote.claim(last)

    copies = CheckpointCopies(store.remote, store.retention, recipe.guards.hang_timeout_s)
    copies.add(last, only_newer=True)
    copies.wait()


@contextmanager
def track_run(recipe: Recipe, dataset: TokenDataset, store: TrackingStore) -> Iterator[str]:
    """Begin the run's record, or continue it, and end it with the status that the block ends with.

    The recipe is kept in the run's folder, too.

    Args:
        recipe: The run.
        dataset: Its token store.
        store: Where it is recorded.

    Yields:
        The ID of the run there.
    """
    run_id = store.start_run(
        recipe,
        tags={"ul2r.data": run_fingerprint(recipe, dataset)},
        params=_parameters(recipe, dataset),
        inputs=list_run_inputs(recipe, dataset),
    )
    record_recipe(recipe)
    # Until the block has ended well: any exception, of whatever kind, leaves a run that failed.
    status: RunStatus = "FAILED"
    page = None
    try:
        # Here a failure of the server is one of the run; at the end it would hide that the run is done.
        page = store.find_page(run_id)
        # Within the try: a run whose page cannot be made has failed, too.
        order = plan_run_data(recipe, dataset, find_resume_checkpoint(recipe)).order
        # A page of a whole store cannot be made before there is one, which the run itself waits for.
        must_wait = order.whole_store and not dataset.manifest.is_complete
        if must_wait:
            logger.info("%s: waits until its token store is complete", recipe.name)
        else:
            store.log_artifact(run_id, write_page(recipe, dataset, order))
        yield run_id
        if must_wait:
            store.log_artifact(run_id, write_page(recipe, dataset, order))
        status = "FINISHED"
    except (KeyboardInterrupt, RunInterrupted):
        status = "KILLED"
        raise
    finally:
        # It also writes what rank 0's tracker had to leave on disk.
        store.finish_run(run_id, recipe.paths.folder, status)
        _log_page(recipe, page)


def _log_page(recipe: Recipe, page: str | None) -> None:
    if page is not None:
        logger.info("%s: charts of its experiment: %s", recipe.name, page)


def _parameters(recipe: Recipe, dataset: TokenDataset) -> dict[str, str | int | float]:
    """Return the parameters of a run that are no settings of its recipe."""
    return {
        "mixture": ", ".join(f"{d.name} {d.weight:g}" for d in recipe.objective.mixture),
        "parameters": num_parameters(recipe.model, dataset.vocabulary.size),
    }
