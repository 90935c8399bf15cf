"""A run under Ray Train: checked first, then trained by workers that are restarted when they die."""

from __future__ import annotations

import logging
import math
import threading
from contextlib import nullcontext
from typing import Any

import ray

# Ray Train 2.60 has no public way to replace its failure policy or to leave out one of its callbacks.
from ray._private.worker import get_dashboard_url
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from ul2r.config import Recipe
from ul2r.data.prepare.pairs import load_finished_pairs, prepare_pairs
from ul2r.data.prepare.prepare import check_resumable
from ul2r.data.store.dataset import TokenDataset, open_run_dataset, run_fingerprint
from ul2r.launch.preflight import (
    NO_GPU,
    check_run,
    check_unprepared,
    final_checkpoint_info,
    find_resume_checkpoint,
    gpu_environment,
    has_finished,
    mark_finished,
    track_run,
)
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.launch.ray_train.elastic import count_cpus, has_room, resources_per_worker, shrink_layout
from ul2r.launch.ray_train.entry_point import start_worker
from ul2r.launch.ray_train.failures import FailurePolicy, describe_deaths, find_cause
from ul2r.launch.ray_train.progress import progress_board
from ul2r.launch.ray_train.start import StartMonitor
from ul2r.launch.ray_train.streaming import build_store_in_background
from ul2r.launch.stop_signal import StopSignal
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import acquire_writer_token
from ul2r.train.trial_build import check_buildable

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
    store = check_store(recipe.tracking.uri)
    if resumed is not None and has_finished(recipe, resumed):
        mark_finished(recipe, store)
        return resumed
    store.check_experiment(recipe.tracking.experiment)

    check_buildable(recipe)
    must_build = dataset is None or not dataset.manifest.is_complete
    if must_build:
        check_resumable(recipe)
    cpus = count_cpus(recipe)
    gpus = recipe.parallel.num_workers * recipe.launch.gpus_per_worker
    with (
        # `must_build` counts as one: the store is built with at least one CPU besides the run's own.
        connect_ray(cpus + must_build, gpus, smaller="lower parallel.num_workers"),
        build_store_in_background(recipe, cpus) if must_build else nullcontext(dataset) as dataset,
    ):
        assert dataset is not None
        # What could not be checked without a store.
        if must_build:
            check_run(recipe, dataset, find_resume_checkpoint(recipe))
        with StopSignal() as stop_signal, track_run(recipe, dataset, store) as run_id:
            _fit_and_shrink(recipe, dataset, store, run_id, stop_signal.received)
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


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types here
    """Ray Train's trainer with three private methods of 2.60 replaced, for which it has no settings.

    Args:
        monitor: Watches the start of the workers.
        arguments: Ray Train's own.
    """

    def __init__(self, monitor: StartMonitor, **arguments: Any) -> None:  # noqa: ANN401  Ray's own arguments
        super().__init__(start_worker, **arguments)
        self._monitor = monitor

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:  # noqa: ANN401  Ray's own arguments
        """Run with a failure policy that gives up at once where a restart cannot help."""
        # The only way in: Ray Train calls this method with its own default policy among the arguments.
        config = self.train_loop_config
        policy = FailurePolicy(self.run_config.failure_config, config["recipe"], config["board"])
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Leave Ctrl-C as it is: Ray's handler waits for workers that still start, and then exits with code 0."""
        # The only method that gets the controller, right after its creation.
        self._monitor.watch(controller)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Leave out the actor that frees the workers' resources should the controller die, if it cannot work.

        It asks the dashboard. Without one it delays the end of every run by its full timeout.
        """
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]


def _fit_and_shrink(
    recipe: Recipe,
    dataset: TokenDataset,
    store: TrackingStore,
    run_id: str,
    stop_event: threading.Event,
) -> None:
    """Train; if machines are lost, continue with fewer replicas as far as the recipe allows."""
    while True:
        try:
            return _fit(recipe, run_fingerprint(recipe, dataset), store, run_id, stop_event)
        # A user error is raised as itself (see `find_cause`) and ends the run, whatever machines are left.
        except TrainingFailedError as error:
            left = ray.cluster_resources()
            # If no machine is missing, workers died of something else, more often than `launch.max_failures` allows.
            is_smaller = not has_room(recipe, left)
            smaller = shrink_layout(recipe, left, dataset.vocabulary.size) if is_smaller else None
            if smaller is None:
                deaths = describe_deaths(error, recipe)
                if deaths is not None:
                    raise deaths from error
                raise
            logger.warning(
                "%s: the cluster has %g CPUs and %g GPUs left: continuing with parallel.num_workers=%d of %d",
                recipe.name,
                left.get("CPU", 0),
                left.get("GPU", 0),
                smaller.parallel.num_workers,
                recipe.parallel.num_workers,
            )
            recipe = smaller


def _fit(
    recipe: Recipe,
    fingerprint: str,
    store: TrackingStore,
    run_id: str,
    stop_event: threading.Event,
) -> None:
    """Run Ray Train until the run ends or fails for good."""
    launch = recipe.launch
    environment = gpu_environment(recipe.parallel) if launch.gpus_per_worker else NO_GPU
    with (
        progress_board(recipe, stop_event) as board,
        StartMonitor(recipe, board, stop_event) as monitor,
    ):
        trainer = _Trainer(
            monitor,
            train_loop_config={
                "recipe": recipe,
                "fingerprint": fingerprint,
                "uri": store.uri,
                "run_id": run_id,
                "board": board.actor,
                # A new one for each start: workers of an earlier one that still live can save no more.
                "writer_token": acquire_writer_token(recipe.paths.checkpoints),
            },
            torch_config=TorchConfig(
                backend="nccl" if launch.gpus_per_worker else "gloo",
                timeout_s=math.ceil(recipe.guards.collective_timeout_s),
            ),
            scaling_config=ScalingConfig(
                num_workers=recipe.parallel.num_workers,
                use_gpu=bool(launch.gpus_per_worker),
                resources_per_worker=resources_per_worker(recipe),
            ),
            run_config=RunConfig(
                worker_runtime_env={"env_vars": environment},
                # For Ray Train's own state: checkpoints are written by the workers themselves and are not reported to
                # Ray.
                storage_path=str(recipe.paths.ray),
                failure_config=FailureConfig(max_failures=launch.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise find_cause(error) from error
        except RayActorError:
            # The monitor has killed the controller.
            if monitor.outcome is None:
                raise
            raise monitor.outcome from None
