"""The MLflow tracker, and with it all that the platform asks of MLflow.

MLflow's own asynchronous logging drops a batch that the server refuses, with a line in the log only (seen
with 3.17 on SQLite), so `MlflowTracker` has its own writer: one thread, one batch every `BUFFER_S`, and
what could not be written stays in line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from ul2r.errors import ServiceError
from ul2r.tracking.client import check_server, connect, told
from ul2r.tracking.registry import register, resolve
from ul2r.tracking.runs import (
    continue_run,
    end_run,
    find_run,
    history,
    known_run,
    log_artifact,
    log_summary,
    start_run,
)
from ul2r.tracking.tracker import RunStatus
from ul2r.tracking.view import view_pages

__all__ = [
    "MlflowTracker",
    "check_server",
    "continue_run",
    "end_run",
    "find_run",
    "history",
    "known_run",
    "log_artifact",
    "log_summary",
    "register",
    "resolve",
    "start_run",
    "view_pages",
]

BUFFER_S = 2.0
"""Metrics wait this long for others: one request then writes them all."""
CLOSE_TIMEOUT_S = 60.0
"""How long `close` tries to reach a server that does not answer."""
BATCH_METRICS = 1000
"""MLflow's limit for one request."""

_log = logging.getLogger(__name__)


class MlflowTracker:
    """Writes metrics to a run of an MLflow server, from a thread of its own.

    A point is (metric, step). One that the run holds already - logged before a restart and replayed now - is
    left out, so a continued run has each point once. Timestamps are the run's start plus `step` milliseconds:
    the same point written twice by two processes is one row in MLflow's store.

    Args:
        uri: The tracking server.
        run_id: A run made by `start_run`.

    Raises:
        ServiceError: If the server or the run cannot be reached.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._client = connect(uri)
        with told(uri):
            run = self._client.get_run(run_id)
            self._stored = {
                (key, point.step)
                for key in run.data.metrics
                for point in self._client.get_metric_history(run_id, key)
            }
        self._start_ms: int = run.info.start_time
        self._waiting: list[Metric] = []
        # `_lock` is held while `_waiting` is read or changed, so `log` never waits for the network.
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._writer.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Put `metrics` in line; they are written within `BUFFER_S` or so."""
        assert not self._closing.is_set(), "logged after close"
        for key, value in metrics.items():
            if (key, step) not in self._stored:
                self._stored.add((key, step))
                with self._lock:
                    self._waiting.append(Metric(key, float(value), self._start_ms + step, step))

    def flush(self) -> None:
        """Write what waits; where the server does not take it now, it stays in line."""
        self._write_waiting()

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Write what waits and set the run's status.

        Raises:
            ServiceError: If the server could not be reached for `CLOSE_TIMEOUT_S`. After a failed or killed run
                it is only logged, so that it does not hide what made the run fail.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._writer.join()
        try:
            self._end(status)
        except ServiceError as error:
            if status == "FINISHED":
                raise
            _log.error("%s", error)

    def _end(self, status: RunStatus) -> None:
        if self._waiting:
            raise ServiceError(
                f"MLflow at {self._uri} stopped answering: {len(self._waiting)} metric points of run "
                f"{self._run_id} are lost; start the server and continue the run"
            )
        end_run(self._uri, self._run_id, status)

    def _write(self) -> None:
        """Write batches until closed, and then until nothing waits or the time for that is over."""
        deadline = float("inf")
        while time.monotonic() < deadline:
            if self._closing.wait(BUFFER_S):
                deadline = min(deadline, time.monotonic() + CLOSE_TIMEOUT_S)
            reached = self._write_waiting()
            if self._closing.is_set() and reached and not self._waiting:
                return
            if not reached:
                time.sleep(BUFFER_S)

    def _write_waiting(self) -> bool:
        """Write all that waits; False where the server did not take it."""
        with self._writing:
            while True:
                with self._lock:
                    batch = self._waiting[:BATCH_METRICS]
                if not batch:
                    return True
                try:
                    self._client.log_batch(self._run_id, metrics=batch, synchronous=True)
                except MlflowException as error:
                    reason = str(error).partition("\n")[0]
                    _log.warning(
                        "MLflow at %s took no metrics, trying again: %s", self._uri, reason
                    )
                    return False
                with self._lock:
                    del self._waiting[: len(batch)]
