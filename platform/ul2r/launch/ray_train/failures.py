"""Failures of Ray Train's workers: which are retried, how often, and how the last one is reported."""

from __future__ import annotations

import re
import time

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

# Ray Train 2.60 has no public way to replace its failure policy.
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling.default import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ul2r.config import Recipe
from ul2r.errors import LaunchError, UserError
from ul2r.launch.ray_train.elastic import has_room
from ul2r.train.checkpoint.layout import parse_step
from ul2r.train.checkpoint.storage import CheckpointStore

NODE_DEATH_S = 20.0
"""Time within which Ray's health checks notice that a machine is gone."""
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)\.(?:\s|$)")
"""First sentence of what Ray 2.60 says of a dead worker, before its advice."""


class FailurePolicy(DefaultFailurePolicy):  # type: ignore[misc]  # Ray has no types here
    """Policy that restarts workers unless that cannot help.

    User errors are not retried: they would fail again. Neither is a run that has lost machines and may continue with
    fewer workers: the driver restarts it with a smaller layout.

    Ray's own policy counts failures over the whole life of a run. Here a finished checkpoint renews the budget:
    failures that come one after another at the same place use it up, those of a long run on many machines do not.

    Args:
        failure_config: Ray's own settings.
        recipe: The run.
        board: Actor of the driver's `Board`, which gets the reason for each restart.
    """

    def __init__(self, failure_config: FailureConfig, recipe: Recipe, board: ActorHandle) -> None:
        super().__init__(failure_config)
        self._recipe = recipe
        self._board = board
        self._saved_step = find_saved_step(recipe)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return what Ray Train shall do about a failure."""
        # Of a traceback the last line, which is the error itself.
        self._board.restart.remote(str(training_failed_error).strip().rpartition("\n")[2])
        if isinstance(find_cause(training_failed_error), UserError) or self._must_shrink():
            return FailureDecision.RAISE
        self._renew_budget()
        return super().make_decision(training_failed_error)

    def _renew_budget(self) -> None:
        """Forget earlier failures if the run has saved a later checkpoint since the last one."""
        saved_step = find_saved_step(self._recipe)
        # The highest ever: a run that fell back to an earlier checkpoint makes progress once it is past the later one.
        if saved_step > self._saved_step:
            self._saved_step = saved_step
            # Private counters of Ray Train 2.60, which it never sets back.
            self._worker_group_failures = 0
            self._preemption_failures = 0
            self._controller_failures = 0

    def _must_shrink(self) -> bool:
        """Return whether the run can only continue with fewer workers; wait until Ray knows which nodes are gone."""
        if self._recipe.launch.min_workers is None:
            return False
        deadline = time.monotonic() + NODE_DEATH_S
        while has_room(self._recipe, ray.cluster_resources()):
            if time.monotonic() > deadline:
                return False
            # Ray counts the resources of a lost node until its health checks miss it.
            time.sleep(1)
        return True


def find_saved_step(recipe: Recipe) -> int:
    """Return the step of the run's latest checkpoint, which is not verified; 0 before the first."""
    latest = next(iter(CheckpointStore.from_recipe(recipe).list_checkpoints()), None)
    return (parse_step(latest.name) or 0) if latest is not None else 0


def find_cause(error: TrainingFailedError) -> Exception:
    """Return the user error that a worker raised, or else the failure itself."""
    for cause in _worker_errors(error):
        if isinstance(cause, UserError):
            return cause
    failed: Exception = error
    return failed


def describe_deaths(error: TrainingFailedError, recipe: Recipe) -> LaunchError | None:
    """Return one line for workers that died too often; None if a worker raised an error, which has a traceback."""
    # The errors of other ranks, whose connection to the dead one broke, say nothing more.
    deaths = [cause for cause in _worker_errors(error) if isinstance(cause, RayActorError)]
    if not deaths:
        return None
    found = _EXIT_DETAIL.search(str(deaths[0]))
    reason = f": {found[1]}" if found else ""
    return LaunchError(
        f"{recipe.name}: workers died more than launch.max_failures={recipe.launch.max_failures} times without a new "
        f"checkpoint, the last one is of step {find_saved_step(recipe)}{reason}: see Ray's logs of the workers, then "
        "run the same command again"
    )


def _worker_errors(error: TrainingFailedError) -> list[object]:
    if not isinstance(error, WorkerGroupError):
        return []
    return [_unwrap(failure) for failure in error.worker_failures.values()]


def _unwrap(failure: Exception) -> object:
    """Return the exception that Ray has wrapped in one of its own."""
    # Private to Ray Train 2.60: the wrapper of a worker that does not answer because it has died.
    if isinstance(failure, WorkerHealthCheckFailedError):
        return failure.health_check_failure
    return getattr(failure, "cause", failure)
