"""Points that a run has in MLflow already, asked for only where a process may write them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request_safe

StoredPoint = tuple[str, int, int]
"""Metric, step and timestamp in milliseconds."""

# What MLflow's own page reads its charts by; `MlflowClient` has no function that asks for a range of steps (3.17).
ENDPOINT = "/api/2.0/mlflow/metrics/get-history-bulk-interval"
MAX_RESULTS = 2500
"""Most points in one answer; of more, the server returns a sample."""
LAST_STEP = 2**62


class StoredPoints:
    """Points of a run that were written before this process started, for whoever continues the run.

    Memory: one number for each metric. A replayed step costs a request for each of its metrics, a new one none.

    Args:
        uri: The tracking server.
        run_id: The run.
        metrics: Names of the metrics that the run has.
        waiting: Last step of each metric that an earlier process left on disk: the server may not have it yet.
    """

    def __init__(
        self, uri: str, run_id: str, metrics: Iterable[str], waiting: Mapping[str, int]
    ) -> None:
        self._uri = uri
        self._run_id = run_id
        self._unasked = set(metrics)
        self._last_steps = dict(waiting)

    def find(self, points: Iterable[StoredPoint]) -> set[StoredPoint]:
        """Return those of the points that the server has, and maybe others of their steps.

        Raises:
            MlflowException: If the server fails.
        """
        replayed = defaultdict(set)
        for key, step, _ in points:
            if step <= self._last_step(key):
                replayed[key].add(step)

        found = set[StoredPoint]()
        for key, steps in replayed.items():
            found |= self._read(key, sorted(steps))
        return found

    def _last_step(self, key: str) -> int:
        """Return the last step of a metric that an earlier process logged, -1 if none did."""
        if key in self._unasked:
            # One result is the last point.
            stored = self._ask(key, 0, LAST_STEP, max_results=1)
            steps = [step for _, step, _ in stored]
            self._last_steps[key] = max([*steps, self._last_steps.get(key, -1)])
            self._unasked.remove(key)
        return self._last_steps.get(key, -1)

    def _read(self, key: str, steps: Sequence[int]) -> set[StoredPoint]:
        """Return the points of a metric in a range that holds these ascending steps."""
        stored = self._ask(key, steps[0], steps[-1], MAX_RESULTS)
        if len(stored) < MAX_RESULTS or len(steps) == 1:
            return set(stored)
        middle = len(steps) // 2
        return self._read(key, steps[:middle]) | self._read(key, steps[middle:])

    def _ask(self, key: str, start: int, end: int, max_results: int) -> list[StoredPoint]:
        query = {
            "run_ids": self._run_id,
            "metric_key": key,
            "start_step": start,
            "end_step": end,
            "max_results": max_results,
        }
        response = http_request_safe(
            get_default_host_creds(self._uri), ENDPOINT, "GET", params=query
        )
        return [
            (key, int(point["step"]), int(point["timestamp"]))
            for point in response.json().get("metrics", ())
        ]
