"""Metrics of a run among those that Ray's nodes export to Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

from ul2r.train.callbacks import Callback


class PrometheusGauges(Callback):
    """Gauges of all logged metrics, at the metrics port of rank 0's node.

    "train/loss" becomes `ray_ul2r_train_loss{run="..."}`. Metrics of "system/" are left out, since Ray exports its own
    metrics of nodes.

    Args:
        run: Name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges, including one of the step."""
        for key, value in {"progress/step": step, **metrics}.items():
            if not key.startswith("system/"):
                self._gauge(key).set(float(value), {"run": self._run})

    def _gauge(self, key: str) -> Gauge:
        if key not in self._gauges:
            # Prometheus allows letters, digits and underscores in a name.
            name = "ul2r_" + re.sub(r"\W", "_", key, flags=re.ASCII)
            self._gauges[key] = Gauge(name, f"{key} of a training run", ("run",))
        return self._gauges[key]
