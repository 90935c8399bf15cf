"""What Prometheus would read at a node's metrics port while a worker logs."""

from __future__ import annotations

import re
import time

import httpx
import pytest
import ray

from ul2r.launch.ray_train.prometheus import PrometheusTracker
from ul2r.tracking import MemoryTracker
from ul2r.tracking.server import find_free_port

pytestmark = pytest.mark.integration


class Worker:
    """A process of the cluster that logs as rank 0 does."""

    def log(self) -> list[tuple[int, dict[str, float]]]:
        """Log one step; what was handed on."""
        memory = MemoryTracker()
        tracker = PrometheusTracker(memory, "my-run")
        tracker.log(2, {"train/loss": 9.0})
        tracker.log(3, {"train/loss": 2.5, "train/loss/X-long": 3.5, "system/node/cpu": 1.0})
        return memory.records


def values(text: str) -> dict[str, float]:
    """This project's gauges of the run, by name."""
    found = re.findall(r'^ray_(ul2r_\w+)\{.*run="my-run".*\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_gauges_of_a_run_show_the_last_values() -> None:
    port = find_free_port()
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
    )
    try:
        worker = ray.remote(Worker).remote()
        records = ray.get(worker.log.remote())
        assert [step for step, _ in records] == [2, 3], "they go on to MLflow"
        assert records[1][1]["system/node/cpu"] == 1.0
        wanted = {
            "ul2r_progress_step": 3,
            "ul2r_train_loss": 2.5,
            "ul2r_train_loss_x_long": 3.5,
        }
        deadline, seen = time.monotonic() + 120, dict[str, float]()
        while seen != wanted:
            assert time.monotonic() < deadline, seen
            time.sleep(0.5)
            try:
                seen = values(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text)
            except httpx.TransportError:
                continue  # the port is not open yet
    finally:
        ray.shutdown()
