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
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from ul2r.errors import ServiceError
from ul2r.paths import RunPaths
from ul2r.tracking.artifacts import check_artifact_store
from ul2r.tracking.backlog import Backlog, Point
from ul2r.tracking.client import check_server, create_client, first_line
from ul2r.tracking.model_metrics import link_metrics
from ul2r.tracking.names import is_metric_name
from ul2r.tracking.notes import log_table, note_experiment, note_run
from ul2r.tracking.refusals import INVALID_VALUE, is_refusal
from ul2r.tracking.registry import log_export, register, resolve
from ul2r.tracking.runs import (
    continue_run,
    end_on_error,
    end_run,
    find_run,
    log_artifact,
    log_summary,
    read_metric_history,
    require_run,
    start_run,
)
from ul2r.tracking.stored_points import StoredPoint, StoredPoints
from ul2r.tracking.tracker import RunStatus
from ul2r.tracking.view import (
    add_scores_to_view,
    add_suite_to_view,
    find_view_url,
    list_view_urls,
)

__all__ = [
    "MlflowTracker",
    "add_scores_to_view",
    "add_suite_to_view",
    "check_artifact_store",
    "check_server",
    "continue_run",
    "end_on_error",
    "end_run",
    "find_run",
    "find_view_url",
    "finish_run",
    "link_metrics",
    "list_view_urls",
    "log_artifact",
    "log_export",
    "log_summary",
    "log_table",
    "note_experiment",
    "note_run",
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


class MlflowTracker:
    """Tracker that writes metrics and files to a run of an MLflow server, from a thread of its own.

    A point is (metric, step, rewinds). One that the run has already, logged before a restart and replayed now, is
    skipped, so a continued run has each point once. Timestamps are the run's start plus `step` plus `rewinds`
    milliseconds: the same point written by two processes is one row in MLflow's store, and of a step that was taken
    again the later value has the later timestamp. Points that were written are forgotten: memory does not grow.

    The server may be down for any length of time, at the start too. What it refuses is left out, with a line for each
    metric and file, and holds back nothing else. As a context manager it closes at the end of the block; after an error
    it saves the backlog to disk and leaves the rest to `finish_run`.

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

        self._start_ms = 0
        self._stored: StoredPoints | None = None
        self._refused = Counter[str]()
        # Empty while the server accepts what is written.
        self._problem = ""
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
        if self._refused:
            counts = ", ".join(f"{count} of {key}" for key, count in sorted(self._refused.items()))
            _log.warning("points that MLflow refused and run %s lacks: %s", self._run_id, counts)
        if self._backlog.is_empty:
            end_run(self._uri, self._run_id, status)
            return

        # A server that answers but does not take everything: the run must not stay RUNNING there.
        with suppress(ServiceError):
            end_run(self._uri, self._run_id, "FAILED" if status == "FINISHED" else status)
        raise ServiceError(
            f"MLflow at {self._uri} does not accept what is left ({self._problem}): {self._backlog.num_points} metric "
            f"points and {self._backlog.num_files} files of run {self._run_id} are saved in {self._backlog.path}: "
            "start the server and rerun the same command"
        )

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
        # Also the errors of requests and of the packages of artifact stores: the thread must outlive all of them.
        except Exception as error:  # noqa: BLE001  as above
            if not self._problem:
                _log.warning(
                    "MLflow at %s does not accept what is logged, retrying: %s",
                    self._uri,
                    first_line(error),
                )
            self._problem = first_line(error)
            return False
        self._problem = ""
        return True

    def _write_batch(self) -> bool:
        """Write the oldest points; return False if there are none."""
        batch = self._backlog.first_points(MAX_BATCH_METRICS)
        if not batch:
            return False

        # Asked for here and not in the constructor: the server may be down when the run starts.
        if self._stored is None:
            run = self._client.get_run(self._run_id)
            self._start_ms = run.info.start_time
            self._stored = StoredPoints(
                self._uri, self._run_id, run.data.metrics, self._backlog.loaded_steps
            )

        # Of a point that is twice in the batch, the later value.
        points = {self._stored_point(p): p.value for p in batch if is_metric_name(p.key)}
        stored = self._stored.find(points)
        self._log_metrics(
            [
                Metric(key, value, timestamp, step)
                for (key, step, timestamp), value in points.items()
                if (key, step, timestamp) not in stored
            ]
        )
        self._backlog.remove_points(len(batch))

        # Counted at the end, so that a batch that is tried again is counted once.
        for point in batch:
            if not is_metric_name(point.key):
                self._leave_out(point.key, "it is not a name that MLflow takes")
        return True

    def _stored_point(self, point: Point) -> StoredPoint:
        # MLflow's key of a metric row is (run, metric, timestamp, step, value): a timestamp of now would store a
        # replayed point again.
        return point.key, point.step, self._start_ms + point.step + point.rewinds

    def _log_metrics(self, metrics: list[Metric]) -> None:
        """Write metrics in one request, or, if the server refuses some of them, all others.

        Raises:
            MlflowException: If the server cannot be reached, or refuses everything without naming a value.
        """
        if not metrics:
            return
        try:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            # A run that was deleted on its page refuses everything, and may be restored there.
            if not is_refusal(error) or not self._is_active():
                raise
            refused = self._find_refused(metrics)
            if len(refused) == len(metrics) and error.error_code != INVALID_VALUE:
                # More likely a fault of the server's than of every point.
                raise
            for metric, reason in refused:
                self._leave_out(metric.key, first_line(reason))

    def _find_refused(self, metrics: list[Metric]) -> list[tuple[Metric, MlflowException]]:
        """Write metrics in ever smaller halves; return those that the server refuses by themselves."""
        refused = []
        middle = (len(metrics) + 1) // 2
        for half in filter(None, (metrics[:middle], metrics[middle:])):
            try:
                self._client.log_batch(self._run_id, metrics=half, synchronous=True)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                refused += [(half[0], error)] if len(half) == 1 else self._find_refused(half)
        return refused

    def _is_active(self) -> bool:
        return bool(self._client.get_run(self._run_id).info.lifecycle_stage == "active")

    def _leave_out(self, key: str, reason: str) -> None:
        """Count a refused point; the first of each metric is logged."""
        if key not in self._refused:
            _log.error("MLflow refuses metric %r, whose points are left out: %s", key, reason)
        self._refused[key] += 1

    def _write_file(self) -> bool:
        """Upload the oldest file; return False if there is none."""
        file = self._backlog.first_file()
        if file is None:
            return False

        # A file that is gone or refused is not retried: it would block those behind it.
        if not file.exists():
            _log.error(
                "%s no longer exists and is missing from the artifacts of run %s",
                file,
                self._run_id,
            )
        else:
            try:
                self._client.log_artifact(self._run_id, str(file), file.parent.name)
            except Exception as error:
                if not is_refusal(error):
                    raise
                _log.error(
                    "%s is not among the artifacts of run %s, which MLflow refuses: %s",
                    file,
                    self._run_id,
                    first_line(error),
                )
        self._backlog.remove_file()
        return True


def finish_run(uri: str, run_id: str, folder: Path, status: RunStatus) -> None:
    """Write the backlog that a worker left on disk, then set the run's status.

    Raises:
        ServiceError: If the server cannot be reached after a finished run; after a failed one this is only logged.
    """
    MlflowTracker(uri, run_id, folder).close(status)
