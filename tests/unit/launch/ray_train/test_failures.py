"""Failure policy of workers under Ray Train, and the line that ends a run whose workers die."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from ul2r.config import Recipe
from ul2r.errors import CorpusError
from ul2r.launch.ray_train.failures import FailurePolicy, describe_deaths
from ul2r.testing.recipes import tiny_recipe

ACTOR_DIED = RayActorError(
    error_msg="The actor died unexpectedly before finishing this task.\n\tpid: 7112\nThe actor is dead because its "
    "worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed"
)
"""As Ray 2.60 reported a worker that was killed."""
DEATH = WorkerGroupError(
    "failed",
    {
        0: RuntimeError("Connection reset by peer"),
        1: WorkerHealthCheckFailedError("no answer", ACTOR_DIED),
    },
)


class RecordingBoard:
    """Stands for the actor of the driver's board."""

    def __init__(self) -> None:
        self.restart = self
        self.reasons: list[str] = []

    def remote(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        ({0: CorpusError("the store is damaged")}, FailureDecision.RAISE),
        ({0: RuntimeError("peer left"), 1: CorpusError("damaged")}, FailureDecision.RAISE),
        ({0: RuntimeError("peer left")}, FailureDecision.RETRY),
    ],
)
def test_user_errors_are_not_retried(
    failures: dict[int, Exception], decision: FailureDecision
) -> None:
    board = RecordingBoard()
    policy = FailurePolicy(FailureConfig(max_failures=3), tiny_recipe(Path("/nowhere")), board)
    assert policy.make_decision(WorkerGroupError("failed", failures)) is decision
    assert board.reasons == ["failed"]


def save(recipe: Recipe, step: int) -> None:
    """Leave what a finished checkpoint leaves, as far as a driver reads it."""
    name = f"step_{step:08d}"
    (recipe.paths.checkpoints / name).mkdir(parents=True)
    (recipe.paths.checkpoints / "latest").write_text(name)


def test_each_new_checkpoint_renews_the_budget_of_failures(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, launch={"max_failures": 1})
    save(recipe, 4)
    policy = FailurePolicy(FailureConfig(max_failures=1), recipe, RecordingBoard())

    for step in (8, 12, 16):
        save(recipe, step)
        assert policy.make_decision(DEATH) is FailureDecision.RETRY
    assert policy.make_decision(DEATH) is FailureDecision.RAISE


def test_falling_back_to_an_earlier_checkpoint_does_not_renew_it(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, launch={"max_failures": 1})
    save(recipe, 8)
    policy = FailurePolicy(FailureConfig(max_failures=1), recipe, RecordingBoard())
    assert policy.make_decision(DEATH) is FailureDecision.RETRY
    save(recipe, 4)  # step 8 was damaged, and the run repeats the steps before it
    assert policy.make_decision(DEATH) is FailureDecision.RAISE


def test_deaths_are_reported_in_one_line_and_errors_keep_their_traceback(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, launch={"max_failures": 1})
    save(recipe, 8)
    line = str(describe_deaths(DEATH, recipe))
    assert "\n" not in line
    assert line.startswith(
        "tiny: workers died more than launch.max_failures=1 times without a new checkpoint, the last one is of step 8: "
        "Worker unexpectedly exits with a connection error code 2: see Ray's logs"
    )
    assert describe_deaths(WorkerGroupError("failed", {0: ValueError("a bug")}), recipe) is None
