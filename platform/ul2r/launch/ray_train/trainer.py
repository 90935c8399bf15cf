"""A run under Ray Train: checked first, then workers that are restarted where they die."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from typing import Any

import ray
from ray._private.worker import get_dashboard_url
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling.default import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ul2r.config import Recipe
from ul2r.data.prepare.prepare import check_resumable
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import UserError
from ul2r.launch.preflight import (
    NO_GPU,
    check_run,
    check_unprepared,
    gpu_environment,
    latest_checkpoint_info,
    mark_finished,
    track_run,
)
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.launch.ray_train.elastic import cpus_needed, has_room, resources_per_worker, shrink_layout
from ul2r.launch.ray_train.progress import shown_progress
from ul2r.launch.ray_train.streaming import build_store_in_background
from ul2r.launch.stop_signal import sigterm_noted
from ul2r.tracking.mlflow import check_server
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import acquire_writer_token

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> CheckpointInfo:
    """Train the run from where it stands to its last step.

    Store, base, own checkpoints, memory, tracking server and cluster are checked before anything starts. A streamed
    store is made meanwhile, as far as it is not there.

    Returns:
        The description of its last checkpoint; at once, if that was written before.

    Raises:
        UserError: If one of the checks fails.
        KeyboardInterrupt: After a checkpoint, if this process got SIGTERM.
    """
    is_begun = recipe.storage_paths.store.exists() or recipe.data.order == "shuffled"
    dataset = open_dataset(recipe.storage_paths.store) if is_begun else None
    reached = None
    if dataset is None:
        check_unprepared(recipe)
    else:
        reached = check_run(recipe, dataset)
    uri = check_server(recipe.tracking.uri)
    if reached is not None and reached.is_finished:
        mark_finished(recipe, uri)
        return reached
    grows = dataset is None or not dataset.manifest.is_complete
    if grows:
        check_resumable(recipe)  # refuses what the rest of its store cannot be made of
    cpus, gpus = cpus_needed(recipe), recipe.parallel.num_workers * recipe.launch.gpus_per_worker
    with (
        connect_ray(cpus + grows, gpus, smaller="lower parallel.num_workers"),
        build_store_in_background(recipe, cpus) if grows else nullcontext(dataset) as dataset,
    ):
        assert dataset is not None
        if grows:
            check_run(recipe, dataset)
        with sigterm_noted() as stopped, track_run(recipe, dataset, uri) as run_id:
            _fit_and_shrink(recipe, dataset, uri, run_id, stopped)
            reached = latest_checkpoint_info(recipe)
            if not reached.is_finished:
                raise KeyboardInterrupt
    return reached


NODE_DEATH_S = 20.0
"""A machine that is gone is known to be within this time, by Ray's health checks."""


class FailurePolicy(DefaultFailurePolicy):  # type: ignore[misc]  # Ray has no types here
    """Restarts workers, unless that cannot help.

    One of them met a mistake of the user's: it would meet it again. Or the cluster has lost what they need, and the
    driver may start fewer.

    Args:
        failure_config: Ray's.
        recipe: The run.
    """

    def __init__(self, failure_config: FailureConfig, recipe: Recipe) -> None:
        super().__init__(failure_config)
        self._recipe = recipe

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """What Ray Train does about a failure."""
        if isinstance(_cause(training_failed_error), UserError) or self._may_shrink():
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)

    def _may_shrink(self) -> bool:
        """Whether the run may go on with fewer workers, and must."""
        if self._recipe.launch.min_workers is None:
            return False
        deadline = time.monotonic() + NODE_DEATH_S
        while has_room(self._recipe, ray.cluster_resources()):
            if time.monotonic() > deadline:
                return False
            time.sleep(1)
        return True


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types here
    """Ray Train's trainer (2.60) without three of its habits."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:  # noqa: ANN401  Ray's
        """Give up at once where starting again cannot help."""
        recipe: Recipe = self.train_loop_config["recipe"]
        policy = FailurePolicy(self.run_config.failure_config, recipe)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    def _register_sigint_handler(self, _: object) -> None:
        """Leave Ctrl-C as it is: Ray's answer waits for workers that still start, and then exits with code 0."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Leave out the actor that frees the workers' place should Ray's controller die, where it cannot work.

        It asks the dashboard, and where there is none it holds up the end of every run for as long as it may.
        """
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


def _fit_and_shrink(
    recipe: Recipe, dataset: TokenDataset, uri: str, run_id: str, stopped: threading.Event
) -> None:
    """Train; where machines are lost, go on with fewer replicas as far as the recipe lets it."""
    while True:
        try:
            return _fit(recipe, dataset.manifest.fingerprint, uri, run_id, stopped)
        except TrainingFailedError:
            left = ray.cluster_resources()
            if has_room(recipe, left):
                raise
            smaller = shrink_layout(recipe, left, dataset.vocabulary.size)
            if smaller is None:
                raise
            logger.warning(
                "%s: the cluster has %g CPUs and %g GPUs left: going on with parallel.num_workers=%d of %d",
                recipe.name,
                left.get("CPU", 0),
                left.get("GPU", 0),
                smaller.parallel.num_workers,
                recipe.parallel.num_workers,
            )
            recipe = smaller


def _fit(recipe: Recipe, fingerprint: str, uri: str, run_id: str, stopped: threading.Event) -> None:
    per_step = recipe.training.global_batch_size * recipe.objective.sequence_length
    total = recipe.training.steps * per_step
    launch = recipe.launch
    with shown_progress(recipe.name, total, stopped) as board:
        trainer = _Trainer(
            _train_worker,
            train_loop_config={
                "recipe": recipe,
                "fingerprint": fingerprint,
                "uri": uri,
                "run_id": run_id,
                "board": board,
                "tokens_per_step": per_step,
                "writer_token": acquire_writer_token(recipe.paths.checkpoints),
            },
            torch_config=TorchConfig(backend="nccl" if launch.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=recipe.parallel.num_workers,
                use_gpu=bool(launch.gpus_per_worker),
                resources_per_worker=resources_per_worker(recipe),
            ),
            run_config=RunConfig(
                worker_runtime_env={
                    "env_vars": gpu_environment(recipe.parallel)
                    if launch.gpus_per_worker
                    else NO_GPU
                },
                storage_path=str(recipe.paths.ray),
                failure_config=FailureConfig(max_failures=launch.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error


def _cause(error: TrainingFailedError) -> Exception:
    """A user's mistake that a worker met, or else the failure itself."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause: object = getattr(failure, "cause", failure)
            if isinstance(cause, UserError):
                return cause
    failed: Exception = error
    return failed


def _train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker.

    Only there is Megatron-Core imported: the driver and Ray's controller, which import this module, start sooner.
    """
    from ul2r.launch.ray_train.worker import train_worker

    train_worker(**config)
