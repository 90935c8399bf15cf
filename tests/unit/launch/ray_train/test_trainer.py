"""Failure policy and environment of workers under Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from ul2r.config import Parallel
from ul2r.errors import CorpusError
from ul2r.launch.preflight import gpu_environment
from ul2r.launch.ray_train.trainer import FailurePolicy
from ul2r.testing.recipes import tiny_recipe


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
    policy = FailurePolicy(FailureConfig(max_failures=3), tiny_recipe(Path("/nowhere")))
    assert policy.make_decision(WorkerGroupError("failed", failures)) is decision


def test_tensor_parallel_gpu_workers_have_one_connection_to_their_device() -> None:
    assert gpu_environment(Parallel(num_workers=2, tensor=2)) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1"
    }
    assert gpu_environment(Parallel(num_workers=2)) == {}
