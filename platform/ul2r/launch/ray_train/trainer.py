"""A run under Ray Train: checked first, then trained by workers that are restarted when they die."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import load_finished_pairs, prepare_pairs
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.launch.disk_space import check_store_space
from ul2r.launch.preflight import (
    check_run,
    check_unprepared,
    final_checkpoint_info,
    find_resume_checkpoint,
    has_finished,
    mark_finished,
    planned_vocabulary,
    track_run,
)
from ul2r.launch.stop_signal import StopSignal
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.trial_build import start_trial_build

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> CheckpointInfo:
    """Train the run from where it stands to its last step.

    Store, base, checkpoints, memory, tracking server and cluster are checked before anything starts. What is missing
    of a streamed store is built meanwhile.

    Returns:
        Metadata of the run's last checkpoint; at once, if the run was finished before.

    Raises:
        UserError: If a check fails.
        RunInterrupted: After a checkpoint, if this process received SIGTERM.
    """
    dataset = _open_if_begun(recipe)
    resumed = None
    if dataset is None:
        check_unprepared(recipe)
    else:
        resumed = find_resume_checkpoint(recipe)
        check_run(recipe, dataset, resumed)
    if resumed is not None and has_finished(recipe, resumed):
        mark_finished(recipe, check_store(recipe.tracking.uri))
        return resumed
    logger.info("%s: recipe and files are checked; checking the model, starting Ray", recipe.name)
    with start_trial_build(recipe) as wait_for_build:
        store = check_store(recipe.tracking.uri)
        store.check_experiment(recipe.tracking.experiment)
        return _train_on_ray(recipe, dataset, store, wait_for_build)


def _train_on_ray(
    recipe: Recipe,
    begun: TokenDataset | None,
    store: TrackingStore,
    wait_for_build: Callable[[], None],
) -> CheckpointInfo:
    """Connect to Ray and train.

    Args:
        recipe: The run.
        begun: Its token store, None if there is none yet.
        store: Where the run is recorded.
        wait_for_build: Waits for the trial build of the model, which runs meanwhile.
    """
    # Imported here: what was wrong so far is reported without the seconds that Ray takes to import.
    from ul2r.data.prepare.prepare import check_resumable
    from ul2r.launch.ray_train.cluster import connect_ray
    from ul2r.launch.ray_train.elastic import count_cpus
    from ul2r.launch.ray_train.fit import fit_and_shrink
    from ul2r.launch.ray_train.streaming import build_store_in_background

    must_build = begun is None or not begun.manifest.is_complete
    if must_build:
        check_resumable(recipe)
        check_store_space(recipe, planned_vocabulary(recipe))
    cpus = count_cpus(recipe)
    gpus = recipe.parallel.num_workers * recipe.launch.gpus_per_worker
    # `must_build` counts as one: the store is built with at least one CPU besides the run's own.
    with connect_ray(cpus + must_build, gpus, smaller="lower parallel.num_workers"):
        # Before anything is written, or recorded.
        wait_for_build()
        logger.info("%s: Ray is up, the model is checked", recipe.name)
        with (
            build_store_in_background(recipe, cpus) if must_build else nullcontext(begun) as dataset
        ):
            assert dataset is not None
            # What could not be checked without a store.
            if must_build:
                check_run(recipe, dataset, find_resume_checkpoint(recipe))
            with StopSignal() as stop_signal, track_run(recipe, dataset, store) as run_id:
                fit_and_shrink(recipe, dataset, store, run_id, stop_signal.received)
                return final_checkpoint_info(recipe)


def _open_if_begun(recipe: Recipe) -> TokenDataset | None:
    """Open the recipe's token store; None if it is to be streamed and does not exist yet."""
    store = recipe.storage_paths.store
    if recipe.data.order == "streamed":
        if not store.exists():
            if recipe.data.pairs:
                load_finished_pairs(recipe)  # that their files are there
            return None
        # Small next to the text, pairs are made as a whole before the run begins.
        if recipe.data.pairs:
            prepare_pairs(recipe)
    return open_run_dataset(recipe)
