"""The MLflow tracker, and with it all that the platform asks of MLflow.

MLflow's own asynchronous logging drops a batch that the server refuses, with a line in the log only (seen
with 3.17 on SQLite), so `MlflowTracker` has its own writer: one thread, one batch every `BUFFER_S`, and
what could not be written stays in line. Nobody waits for the server but that thread: what must not be lost
is put on disk, where the next attempt at the run finds it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from ul2r.errors import ServiceError
from ul2r.tracking.client import check_server, connect
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
"""Metrics wait this long for others: one request then writes them all."""
CLOSE_TIMEOUT_S = 60.0
"""How long `close` tries to reach a server that does not answer."""
BATCH_METRICS = 1000
"""MLflow's limit for one request."""
BACKLOG = "tracking_waiting.json"
"""File of a run folder with what the server has not taken yet."""

_log = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    step: int
    rewinds: int


class MlflowTracker:
    """Writes metrics and files to a run of an MLflow server, from a thread of its own.

    A point is (metric, step, rewinds). One that the run holds already - logged before a restart and replayed now - is
    left out, so a continued run has each point once. Timestamps are the run's start plus `step` plus `rewinds`
    milliseconds: the same point written twice by two processes is one row in MLflow's store, and of a step that was
    taken again the later one is the last.

    The server may be away for any time, at the start too. Used as a context, it is closed at the end of the block;
    after an error what waits is put on disk and left to `finish_run`.

    Args:
        uri: The tracking server.
        run_id: A run made by `start_run`.
        folder: The run's; what waits is kept in its `tracking_waiting.json` where it must not be lost.
    """

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri, self._run_id, self._backlog = uri, run_id, folder / BACKLOG
        self._client = connect(uri)
        self._stored: set[tuple[str, int, int]] | None = None
        self._start_ms = 0
        self._waiting, self._files = _read_backlog(self._backlog)
        # `_lock` is held while the two are read or changed, so `log` never waits for the network.
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closing, self._reached = threading.Event(), True
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
        if kind is None:
            self.close()
        else:
            self.flush()

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Put `metrics` in line; they are written within `BUFFER_S` or so."""
        assert not self._closing.is_set(), "logged after close"
        points = [Point(key, float(value), step, rewinds) for key, value in metrics.items()]
        with self._lock:
            self._waiting += points

    def log_artifact(self, file: Path) -> None:
        """Put a file in line, for the folder of the run's artifacts that has its folder's name."""
        with self._lock:
            self._files.append(file)

    def flush(self) -> None:
        """Put what waits on disk; it stays in line."""
        with self._lock:
            content = {"points": self._waiting, "files": [str(file) for file in self._files]}
            if not (self._waiting or self._files):
                self._backlog.unlink(missing_ok=True)
                return
            beside = self._backlog.with_name(f".{BACKLOG}.{os.getpid()}")
            beside.write_text(json.dumps(content), encoding="utf-8")
            beside.replace(self._backlog)

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
        self.flush()
        try:
            self._end(status)
        except ServiceError as error:
            if status == "FINISHED":
                raise
            _log.error("%s", error)

    def _end(self, status: RunStatus) -> None:
        if self._waiting or self._files:
            raise ServiceError(
                f"MLflow at {self._uri} does not answer: {len(self._waiting)} metric points and {len(self._files)} "
                f"files of run {self._run_id} wait in {self._backlog}: start the server and run the same command again"
            )
        end_run(self._uri, self._run_id, status)

    def _write(self) -> None:
        """Write batches until closed, and then until nothing waits or the time for that is over."""
        deadline = float("inf")
        while time.monotonic() < deadline:
            if self._closing.wait(BUFFER_S):
                deadline = min(deadline, time.monotonic() + CLOSE_TIMEOUT_S)
            reached = self._write_waiting()
            if self._closing.is_set() and reached and not (self._waiting or self._files):
                return
            if not reached:
                time.sleep(BUFFER_S)

    def _write_waiting(self) -> bool:
        """Write all that waits; False where the server did not take it."""
        try:
            with self._writing:
                while self._write_batch():
                    pass
                while self._write_file():
                    pass
        except (
            MlflowException,
            OSError,
        ) as error:  # of uploads, requests' errors, which are OSErrors
            if self._reached:
                reason = str(error).partition("\n")[0]
                _log.warning("MLflow at %s takes nothing, trying on: %s", self._uri, reason)
            self._reached = False
            return False
        self._reached = True
        return True

    def _write_batch(self) -> bool:
        """Write the first of the waiting points; False where there are none."""
        with self._lock:
            batch = self._waiting[:BATCH_METRICS]
        if not batch:
            return False
        if self._stored is None:
            self._stored = self._ask_for_stored()
        new = {self._identity(point): point for point in batch}
        metrics = [
            Metric(key, point.value, timestamp, step)
            for (key, step, timestamp), point in new.items()
            if (key, step, timestamp) not in self._stored
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        self._stored |= new.keys()
        with self._lock:
            del self._waiting[: len(batch)]
        return True

    def _write_file(self) -> bool:
        """Upload the first of the waiting files; False where there are none."""
        with self._lock:
            if not self._files:
                return False
            file = self._files[0]
        if file.exists():
            self._client.log_artifact(self._run_id, str(file), file.parent.name)
        else:
            _log.error("%s is gone and is not among the artifacts of run %s", file, self._run_id)
        with self._lock:
            del self._files[0]
        return True

    def _ask_for_stored(self) -> set[tuple[str, int, int]]:
        """What the run holds."""
        run = self._client.get_run(self._run_id)
        self._start_ms = run.info.start_time
        return {
            (key, point.step, point.timestamp)
            for key in run.data.metrics
            for point in self._client.get_metric_history(self._run_id, key)
        }

    def _identity(self, point: Point) -> tuple[str, int, int]:
        return point.key, point.step, self._start_ms + point.step + point.rewinds


def finish_run(uri: str, run_id: str, folder: Path, status: RunStatus) -> None:
    """Write what a worker had to leave on disk, then set the run's status.

    Raises:
        ServiceError: If the server cannot be reached after a finished run; after another it is only logged.
    """
    MlflowTracker(uri, run_id, folder).close(status)


def _read_backlog(file: Path) -> tuple[list[Point], list[Path]]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], []
    return [Point(*point) for point in content["points"]], [Path(one) for one in content["files"]]
