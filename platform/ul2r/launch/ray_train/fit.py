"""Workers under Ray Train: started, restarted when they die, and with fewer replicas when machines are lost."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path
from typing import Any

import ray

# Ray Train 2.60 has no public way to replace its failure policy or to leave out some of its callbacks.
from ray._private.worker import get_dashboard_url
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset, run_fingerprint
from ul2r.environment import has_ray_cluster
from ul2r.launch.preflight import NO_GPU, gpu_environment
from ul2r.launch.ray_train.elastic import has_room, resources_per_worker, shrink_layout
from ul2r.launch.ray_train.entry_point import start_worker
from ul2r.launch.ray_train.failures import FailurePolicy, describe_deaths, find_cause
from ul2r.launch.ray_train.process_group import ProcessGroupConfig
from ul2r.launch.ray_train.progress import progress_board
from ul2r.launch.ray_train.start import StartMonitor
from ul2r.launch.ray_train.warm_up import start_data_processes
from ul2r.tracking.store import TrackingStore
from ul2r.train.checkpoint.storage import acquire_writer_token

logger = logging.getLogger(__name__)


class _OneNodePolicy(FixedScalingPolicy):  # type: ignore[misc]  # Ray has no types here
    """Ray Train's policy of a fixed number of workers, which asks nobody for machines.

    Ray's own (2.60) waits for an actor that asks a cluster's autoscaler, which a node of the run's own has not.
    """

    def after_controller_start(self, train_run_context: object) -> None:
        """Ask for nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Ask for nothing."""


class _Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types here
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
        arguments["failure_policy"] = policy
        if has_ray_cluster():
            return super()._initialize_and_run_controller(**arguments)

        # As Ray's method, without a runtime environment: its variables are those of the node, which this process has
        # started. A process that runs already serves then (`warm_up.py`), as it does for the controller's own actors.
        arguments["scaling_policy"] = _OneNodePolicy(self.scaling_config)
        controller = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
        self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Leave Ctrl-C as it is: Ray's handler waits for workers that still start, and then exits with code 0."""
        # The only method that gets the controller, right after its creation.
        self._monitor.watch(controller)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Leave out two of Ray's callbacks, each of which starts an actor and so imports Ray Train once more.

        One is for the trainer's own data sets: workers here split theirs themselves (`worker.py`). The other frees the
        workers' resources should the controller die. It asks the dashboard; without one it cannot work, and delays the
        end of every run by its full timeout.
        """
        left_out: tuple[type, ...] = (DatasetsCallback,)
        if not get_dashboard_url():
            left_out += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, left_out)]


def fit_and_shrink(
    recipe: Recipe,
    dataset: TokenDataset,
    store: TrackingStore,
    run_id: str,
    stop_event: threading.Event,
) -> None:
    """Train; if machines are lost, continue with fewer replicas as far as the recipe allows.

    Args:
        recipe: The run.
        dataset: Its token store.
        store: Where it is recorded.
        run_id: Its ID there.
        stop_event: Set when the run is to stop.

    Raises:
        UserError: If a worker raised it, or workers died too often.
        RunInterrupted: If the run is to stop before its first step.
    """
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
    start_data_processes(recipe, environment)
    with (
        progress_board(recipe, stop_event) as board,
        StartMonitor(recipe, board, stop_event) as monitor,
    ):
        trainer = _Trainer(
            monitor,
            train_loop_config={
                "folder": str(Path.cwd()),
                "recipe": recipe,
                "fingerprint": fingerprint,
                "uri": store.uri,
                "run_id": run_id,
                "board": board.actor,
                # A new one for each start: workers of an earlier one that still live can save no more.
                "writer_token": acquire_writer_token(recipe.paths.checkpoints),
            },
            backend_config=ProcessGroupConfig(
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
