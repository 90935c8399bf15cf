"""A cluster of two machines that announces the loss of one, so that the run saves first, and then loses it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ul2r.config import Recipe, dump
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.mlflow import find_run, read_metric_history
from ul2r.tracking.server import run_mlflow_server
from ul2r.train.checkpoint.metadata import CheckpointInfo

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 120
WAIT_S = 400


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:  # noqa: ANN401  the condition's own value
    """Poll a condition until it is true and return its value; fail on a timeout or if `process` ends first."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.05)
    raise AssertionError(f"the condition was not met within {WAIT_S} s")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a cluster whose head has room for one worker."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def train_losses(recipe: Recipe) -> list[float]:
    """Train on this rank and return the loss of each step."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    tracker = MemoryTracker()
    run_worker(recipe, tracker)
    return [loss for _, loss in tracker.series("train/loss")]


def announce_preemption(cluster: Cluster, node: str) -> None:
    """Announce to the cluster that a machine will be taken away in ten minutes."""
    is_accepted, reason = GcsClient(address=cluster.address).drain_node(
        node,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "taken back",
        int(time.time() + 600) * 1000,
    )
    assert is_accepted, reason


def test_run_saves_before_a_machine_is_taken_and_continues_with_fewer_replicas(
    cluster: Cluster, tmp_path: Path
) -> None:
    make_tiny_store(tmp_path / "store")
    recipe = tiny_recipe(
        tmp_path,
        parallel={"num_workers": 2},
        training={"steps": STEPS},
        optimizer={"learning_rate": 1e-3},
        validation={"every": STEPS},
        checkpoints={"every": STEPS},
        launch={"min_workers": 1, "cpus_per_data_task": 0},
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(recipe))
    other = cluster.add_node(num_cpus=1)
    with run_mlflow_server(tmp_path) as uri, (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "jobs/train.py", str(path)],
            cwd=ROOT,
            env=os.environ
            | {
                "RAY_ADDRESS": cluster.address,
                "MLFLOW_TRACKING_URI": uri,
                "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "90",
            },
            stdout=log,
            stderr=log,
        )
        pointer = recipe.paths.checkpoints / "latest"
        wait_for(lambda: "tokens/s" in (tmp_path / "log").read_text(), driver)
        announce_preemption(cluster, other.node_id)
        name = wait_for(lambda: pointer.exists() and pointer.read_text(), driver)
        saved = CheckpointInfo.read(pointer.parent / name).step
        cluster.remove_node(other, allow_graceful=False)
        assert driver.wait(WAIT_S) == 0, (tmp_path / "log").read_text()
        run_id = find_run(uri, recipe.paths.folder)
        assert run_id is not None
        found = read_metric_history(uri, run_id, "train/loss")
        status = MlflowClient(uri).get_run(run_id).info.status
    log_text = (tmp_path / "log").read_text()
    assert saved < STEPS, "only the last checkpoint is due without the announcement"
    assert "continuing with parallel.num_workers=1 of 2" in log_text
    assert "Traceback" not in log_text
    assert status == "FINISHED"
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), (
        "no step is lost or logged twice"
    )
    (whole, _) = run_distributed(train_losses, 2, recipe.model_copy(update={"name": "undisturbed"}))
    np.testing.assert_allclose([loss for _, loss in found], whole, rtol=1e-3)
