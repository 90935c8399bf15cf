"""Start of a run's workers: ended when it makes no progress, and when the run is to stop before its first step."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import ray

# Ray 2.60 has no public way to the folder of a local node's logs.
from ray._private import worker as ray_worker
from ray.actor import ActorHandle

from ul2r.config import Recipe
from ul2r.errors import RunInterrupted, ServiceError
from ul2r.launch.ray_train.elastic import count_cpus, has_room
from ul2r.launch.ray_train.progress import Board

POLL_S = 0.5
LOG_FILES = ("raylet.err", "runtime_env_setup-*.log", "worker-*.err", "raylet.out")
"""Logs of a Ray node that hold the reason for a process that does not start, the most specific ones first."""
REASON = re.compile(r"cannot|denied|error|exception|failed|killed|no such|not found", re.IGNORECASE)
LOG_PREFIX = re.compile(r"^\[.*?\] |^\d{4}-\d\d-\d\d [\d:,]+\s+")
TAIL_BYTES = 100_000

logger = logging.getLogger(__name__)


class StartMonitor:
    """Thread that ends the start of the workers, during the block.

    It ends a start that takes longer than `launch.worker_start_timeout_s`, not counting the time in which machines are
    missing, and a run that is to stop before its first step, when it has nothing to save.

    Args:
        recipe: The run.
        board: Its board.
        stop_event: Set when the run is to stop.

    Attributes:
        outcome: Error that the run ends with, if the monitor has ended it.
    """

    def __init__(self, recipe: Recipe, board: Board, stop_event: threading.Event) -> None:
        self.outcome: ServiceError | RunInterrupted | None = None
        self._recipe = recipe
        self._board = board
        self._stop_event = stop_event
        self._start_time = time.monotonic()
        self._is_waiting = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def watch(self, controller: ActorHandle) -> None:
        """Begin to watch.

        Args:
            controller: Ray Train's controller; the monitor ends a run by killing it, and the workers die with it.
        """
        self._thread = threading.Thread(target=self._watch, args=(controller,), daemon=True)
        self._thread.start()

    def check(self, now: float, resources: Mapping[str, float]) -> None:
        """Set `outcome` if the run is to end.

        Args:
            now: Seconds of the monotonic clock.
            resources: Resources of the cluster.
        """
        name, phase = self._recipe.name, self._board.phase
        if phase != "training" and self._stop_event.is_set():
            self.outcome = RunInterrupted(f"{name}: stopped before its first step, nothing to save")
            return
        if phase != "starting":
            self._start_time = now
            return

        is_waiting = not has_room(self._recipe, resources)
        if is_waiting:
            self._start_time = now
            if not self._is_waiting:
                logger.warning("%s: waiting for machines: %s", name, self._compare(resources))
        self._is_waiting = is_waiting

        limit = self._recipe.launch.worker_start_timeout_s
        if now - self._start_time > limit:
            self.outcome = ServiceError(
                f"{name}: the workers did not start within {limit:g} s (launch.worker_start_timeout_s): "
                f"{self._board.failure or find_reason()}"
            )

    def _watch(self, controller: ActorHandle) -> None:
        resources: Mapping[str, float] = {}
        while not self._ended.wait(POLL_S):
            # Ray may be unreachable for a while: without this thread a start that hangs would never end.
            try:
                # Asked for only during a start: it is a call to another process.
                if self._board.phase == "starting":
                    resources = ray.cluster_resources()
                self.check(time.monotonic(), resources)
                if self.outcome is not None:
                    ray.kill(controller)
                    return
            except Exception as error:  # noqa: BLE001  as above
                logger.debug("the start's monitor asks again: %s", error)

    def _compare(self, resources: Mapping[str, float]) -> str:
        """Return the resources that the cluster has and that the run needs."""
        gpus = self._recipe.parallel.num_workers * self._recipe.launch.gpus_per_worker
        return (
            f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, "
            f"the run needs {count_cpus(self._recipe):g} and {gpus}"
        )


def find_reason() -> str:
    """Return Ray's reason for a start that makes no progress, as far as this machine's logs have it."""
    logs = Path(ray_worker.global_worker.node.get_logs_dir_path())
    reason = next(find_reasons(logs), "Ray's logs on this machine do not tell why")
    try:
        free = f"{ray.available_resources().get('CPU', 0):g} CPUs"
    except Exception as error:  # noqa: BLE001  what Ray raises when its head is gone differs; this is part of a message
        free = f"an unknown number of CPUs ({type(error).__name__})"
    return f"{reason}; {free} are free, others may be another job's; Ray's logs are in {logs}"


def find_reasons(logs: Path) -> Iterator[str]:
    """Yield the lines in a Ray node's logs that may tell why a process does not start, likelier ones first.

    Args:
        logs: Folder of the node's logs.
    """
    for pattern in LOG_FILES:
        for path in sorted(logs.glob(pattern), key=_modified_at, reverse=True):
            for line in reversed(_read_tail(path).splitlines()):
                if REASON.search(line):
                    yield f"{path.name}: {LOG_PREFIX.sub('', line).strip()}"


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        # Ray rotates and removes its logs meanwhile.
        return 0.0


def _read_tail(path: Path) -> str:
    """Return the last `TAIL_BYTES` of a log, nothing of one that is gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read(TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
