"""Gauges at a node's metrics port, as Prometheus reads them while a worker logs."""

from __future__ import annotations

import re
import time

import httpx
import pytest
import ray

from ul2r.launch.ray_train.prometheus import PrometheusGauges
from ul2r.tracking.server import find_free_port

pytestmark = pytest.mark.integration


class Worker:
    """A process of the cluster that logs as rank 0 does."""

    def log(self) -> None:
        """Log two steps."""
        gauges = PrometheusGauges("my-run")
        gauges.on_metrics(2, {"train/loss": 9.0})
        gauges.on_metrics(3, {"train/loss": 2.5, "X-long/train_loss": 3.5, "system/cpu/max": 1.0})


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
        ray.get(worker.log.remote())
        wanted = {
            "ul2r_progress_step": 3,
            "ul2r_train_loss": 2.5,
            "ul2r_x_long_train_loss": 3.5,
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
