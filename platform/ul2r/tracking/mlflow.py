"""The MLflow tracker; the rest of the platform imports all of its MLflow functions from here.

MLflow's own asynchronous logging drops a batch that the server refuses, with a line in the log only (seen with 3.17
on SQLite). `MlflowTracker` therefore has its own writer: one thread, one batch every `BUFFER_S`, and a backlog of what
could not be written. Only that thread waits for the server. What must not be lost is saved to disk, where the next
attempt at the run finds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from ul2r.errors import ServiceError
from ul2r.paths import RunPaths
from ul2r.tracking.backlog import Backlog, Point
from ul2r.tracking.client import check_server, create_client
from ul2r.tracking.registry import register, resolve
from ul2r.tracking.runs import (
    continue_run,
    end_run,
    find_run,
    log_artifact,
    log_summary,
    read_metric_history,
    require_run,
    start_run,
)
from ul2r.tracking.tracker import RunStatus
from ul2r.tracking.view import list_view_urls

__all__ = [
    "MlflowTracker",
    "check_server",
    "continue_run",
    "end_run",
    "find_run",
    "finish_run",
    "list_view_urls",
    "log_artifact",
    "log_summary",
    "read_metric_history",
    "register",
    "require_run",
    "resolve",
    "start_run",
]

BUFFER_S = 2.0
"""Metrics are collected for this long, then written in one request."""
CLOSE_TIMEOUT_S = 60.0
"""Time that `close` spends on a server that does not answer."""
MAX_BATCH_METRICS = 1000
"""MLflow's limit of one request."""

_log = logging.getLogger(__name__)

StoredPoint = tuple[str, int, int]
"""Metric, step and timestamp in milliseconds."""


class MlflowTracker:
    """Tracker that writes metrics and files to a run of an MLflow server, from a thread of its own.

    A point is (metric, step, rewinds). One that the run has already, logged before a restart and replayed now, is
    skipped, so a continued run has each point once. Timestamps are the run's start plus `step` plus `rewinds`
    milliseconds: the same point written by two processes is one row in MLflow's store, and of a step that was taken
    again the later value has the later timestamp.

    The server may be down for any length of time, at the start too. As a context manager it closes at the end of the
    block; after an error it saves the backlog to disk and leaves the rest to `finish_run`.

    Args:
        uri: The tracking server.
        run_id: A run created by `start_run`.
        folder: The run's folder; its `tracking_waiting.json` holds the backlog.
    """

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri = uri
        self._run_id = run_id
        self._client = create_client(uri)
        self._backlog = Backlog(RunPaths(folder).tracking_backlog)

        self._stored: set[StoredPoint] | None = None
        self._start_ms = 0
        self._is_reachable = True
        self._closing = threading.Event()
        # A daemon, so that a process that dies of an error does not wait for a server that is down.
        self._writer = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the driver ends the run, as FAILED or KILLED; closing here would mark it FINISHED.
        if kind is None:
            self.close()
        else:
            self.flush()

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Queue `metrics`; they are written after about `BUFFER_S`."""
        assert not self._closing.is_set(), "logged after close"
        self._backlog.add_points(
            [Point(key, float(value), step, rewinds) for key, value in metrics.items()]
        )

    def log_artifact(self, file: Path) -> None:
        """Queue a file, to be uploaded to the artifact folder with the name of its own folder."""
        self._backlog.add_file(file)

    def flush(self) -> None:
        """Save the backlog to disk; it stays queued."""
        self._backlog.save()

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Write the backlog and set the run's status.

        Raises:
            ServiceError: If the server could not be reached for `CLOSE_TIMEOUT_S`. After a failed or killed run
                this is only logged: raising would hide the reason of the failure.
        """
        if self._closing.is_set():
            return

        self._closing.set()
        # Up to CLOSE_TIMEOUT_S and the time of one request.
        self._writer.join()
        self.flush()
        try:
            self._end(status)
        except ServiceError as error:
            if status == "FINISHED":
                raise
            _log.error("%s", error)

    def _end(self, status: RunStatus) -> None:
        if not self._backlog.is_empty:
            raise ServiceError(
                f"MLflow at {self._uri} does not answer: {self._backlog.num_points} metric points and "
                f"{self._backlog.num_files} files of run {self._run_id} are saved in {self._backlog.path}: "
                "start the server and rerun the same command"
            )
        end_run(self._uri, self._run_id, status)

    def _write(self) -> None:
        """Write batches until closed, then until the backlog is empty or `CLOSE_TIMEOUT_S` has passed."""
        deadline = float("inf")
        while time.monotonic() < deadline:
            # Sleeps until the next batch, and returns at once when `close` is called.
            if self._closing.wait(BUFFER_S):
                deadline = min(deadline, time.monotonic() + CLOSE_TIMEOUT_S)
            is_written = self._write_backlog()
            if self._closing.is_set() and is_written and self._backlog.is_empty:
                return
            # While closing, the wait above returns at once: without a pause, a server that is down would be asked in a
            # tight loop.
            if not is_written:
                time.sleep(BUFFER_S)

    def _write_backlog(self) -> bool:
        """Write the whole backlog; return False if the server did not accept it."""
        try:
            while self._write_batch():
                pass
            while self._write_file():
                pass
        except (MlflowException, OSError) as error:
            # Uploads raise the errors of requests, which are OSErrors, instead of MLflow's own.
            if self._is_reachable:
                reason = str(error).partition("\n")[0]
                _log.warning("MLflow at %s accepts no metrics, retrying: %s", self._uri, reason)
            self._is_reachable = False
            return False
        self._is_reachable = True
        return True

    def _write_batch(self) -> bool:
        """Write the oldest points; return False if there are none."""
        batch = self._backlog.first_points(MAX_BATCH_METRICS)
        if not batch:
            return False

        # Asked for here and not in the constructor: the server may be down when the run starts.
        if self._stored is None:
            self._stored = self._fetch_stored()

        # Of a point that is twice in the batch, the later value.
        new = {self._stored_point(point): point for point in batch}
        metrics = [
            Metric(key, point.value, timestamp, step)
            for (key, step, timestamp), point in new.items()
            if (key, step, timestamp) not in self._stored
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

        self._stored |= new.keys()
        self._backlog.remove_points(len(batch))
        return True

    def _write_file(self) -> bool:
        """Upload the oldest file; return False if there is none."""
        file = self._backlog.first_file()
        if file is None:
            return False

        if file.exists():
            self._client.log_artifact(self._run_id, str(file), file.parent.name)
        else:
            # Not retried: the file will not come back, and would block those behind it.
            _log.error(
                "%s no longer exists and is missing from the artifacts of run %s",
                file,
                self._run_id,
            )
        self._backlog.remove_file()
        return True

    def _fetch_stored(self) -> set[StoredPoint]:
        run = self._client.get_run(self._run_id)
        self._start_ms = run.info.start_time
        return {
            (key, point.step, point.timestamp)
            for key in run.data.metrics
            # `run.data.metrics` has the names of all metrics, but only the latest value of each.
            for point in self._client.get_metric_history(self._run_id, key)
        }

    def _stored_point(self, point: Point) -> StoredPoint:
        # MLflow's key of a metric row is (run, metric, timestamp, step, value): a timestamp of now would store a
        # replayed point again.
        return point.key, point.step, self._start_ms + point.step + point.rewinds


def finish_run(uri: str, run_id: str, folder: Path, status: RunStatus) -> None:
    """Write the backlog that a worker left on disk, then set the run's status.

    Raises:
        ServiceError: If the server cannot be reached after a finished run; after a failed one this is only logged.
    """
    MlflowTracker(uri, run_id, folder).close(status)
