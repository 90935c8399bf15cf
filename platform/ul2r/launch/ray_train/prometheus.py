"""A run's metrics among those that Ray's nodes offer to Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Gauge

from ul2r.tracking.tracker import RunStatus, Tracker


class PrometheusTracker:
    """Shows what is logged as gauges, and hands it on.

    "train/loss" is `ray_ul2r_train_loss{run="..."}` at the metrics port of rank 0's node. Ray has its own metrics of
    nodes, so those of "system/" are left out.

    Args:
        tracker: Where everything goes as well.
        run: Name of the run.
    """

    def __init__(self, tracker: Tracker, run: str) -> None:
        self._tracker, self._run = tracker, run
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Set the gauges, the step's among them."""
        for key, value in {"progress/step": step, **metrics}.items():
            if not key.startswith("system/"):
                self._gauge(key).set(float(value), {"run": self._run})
        self._tracker.log(step, metrics, rewinds)

    def log_artifact(self, file: Path) -> None:
        """Hand it on."""
        self._tracker.log_artifact(file)

    def flush(self) -> None:
        """Hand it on."""
        self._tracker.flush()

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Hand it on."""
        self._tracker.close(status)

    def _gauge(self, key: str) -> Gauge:
        if key not in self._gauges:
            name = "ul2r_" + re.sub(r"\W", "_", key, flags=re.ASCII)
            self._gauges[key] = Gauge(name, f"{key} of a training run", ("run",))
        return self._gauges[key]
