"""Remote copies of a run's checkpoints, made in the background while it trains.

A copy may take longer than the steps between two checkpoints. It never holds up training: copies are made one at a
time, in order, and a checkpoint that is no longer kept on disk when its turn comes is left out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.remote import RemoteCheckpoints, TransferProgress
from ul2r.train.checkpoint.retention import Retention
from ul2r.train.waiting import iter_pauses, run_in_background

LOG_INTERVAL_S = 30.0
"""Time between two lines on the copy that the end of a run waits for."""
GIB = 2**30

logger = logging.getLogger(__name__)


class _Copy(NamedTuple):
    """A checkpoint to copy; if `only_newer`, unless the remote folder has a later one."""

    folder: Path
    only_newer: bool


class CheckpointCopies:
    """Copies of published checkpoints to remote storage, one at a time in a thread of rank 0.

    Args:
        remote: Where the copies go.
        retention: Which of them are kept there.
        stall_timeout_s: Time without progress after which a copy that is waited for counts as hanging.
    """

    def __init__(
        self, remote: RemoteCheckpoints, retention: Retention, stall_timeout_s: float
    ) -> None:
        self._remote = remote
        self._retention = retention
        self._stall_timeout_s = stall_timeout_s
        self._lock = threading.Lock()
        self._queue: deque[_Copy] = deque()
        self._current: _Copy | None = None
        self._progress = TransferProgress()
        self._thread: Future[None] | None = None
        self._failed: tuple[_Copy, CheckpointError] | None = None
        self._has_retried = False

        # Of the wait at the end of a run.
        self._last_seen: object = None
        self._moved_s = 0.0
        self._logged_s = 0.0

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is being copied or waits for its turn."""
        return self._current is not None

    def add(self, folder: Path, *, only_newer: bool = False) -> None:
        """Copy a published checkpoint once those before it have been copied.

        Args:
            folder: The checkpoint.
            only_newer: Leave the remote folder as it is if its latest checkpoint is this one or a later one.
        """
        self._add(_Copy(folder, only_newer))

    def give_up(self, folder: Path) -> bool:
        """Leave out a checkpoint that is about to be removed; return False if it is being copied at this moment."""
        with self._lock:
            if self._current is not None and folder == self._current.folder:
                return False
            for copy in [copy for copy in self._queue if copy.folder == folder]:
                self._queue.remove(copy)
                logger.warning(
                    "%s is not copied to %s: copies are slower than checkpoints (%s)",
                    folder.name,
                    self._remote.url,
                    self._describe(),
                )
        return True

    def watch(self) -> bool:
        """Return whether copies are still being made; to be called again and again at the end of a run.

        A copy that failed last is made a second time, since no later one makes up for it.

        Raises:
            CheckpointError: If the last copy fails again, or makes no progress.
        """
        self._raise_error()
        now_s = time.monotonic()
        if self._last_seen is None:
            self._logged_s = now_s
        seen = (self._current, self._progress.done_bytes, self._progress.num_files)
        if seen != self._last_seen:
            self._last_seen = seen
            self._moved_s = now_s

        if not self.is_busy:
            return self._retry()
        if now_s - self._moved_s > self._stall_timeout_s:
            raise CheckpointError(
                f"the copy of a checkpoint to {self._remote.url} makes no progress for {self._stall_timeout_s:g} s "
                f"(guards.hang_timeout_s; {self._describe()}): the checkpoint itself is complete. Check "
                "checkpoints.remote_dir and rerun the same command, which copies it"
            )
        if now_s - self._logged_s > LOG_INTERVAL_S:
            self._logged_s = now_s
            logger.info("waiting for the copy to %s: %s", self._remote.url, self._describe())
        return True

    def wait(self) -> None:
        """Wait until all copies are made, as `watch` does.

        Raises:
            CheckpointError: If the last copy fails, or makes no progress.
        """
        for pause in iter_pauses():
            if not self.watch():
                return
            time.sleep(pause)

    def leave(self) -> None:
        """Say what is not copied when a run stops early, and begin no other copy."""
        with self._lock:
            self._queue.clear()
        if self.is_busy or self._failed is not None:
            logger.warning(
                "the run stops without waiting for its copy to %s (%s): running the same command again copies its last "
                "checkpoint",
                self._remote.url,
                self._describe(),
            )

    def _retry(self) -> bool:
        if self._failed is None:
            return False
        copy, error = self._failed
        if self._has_retried:
            raise error
        self._has_retried = True
        self._add(copy)
        return True

    def _add(self, copy: _Copy) -> None:
        self._raise_error()
        with self._lock:
            self._queue.append(copy)
            if self._current is None:
                self._current = self._queue.popleft()
                self._thread = run_in_background(self._copy_all, "checkpoint-copy")

    def _raise_error(self) -> None:
        """Raise the error that has ended the thread, if it is no CheckpointError."""
        if self._thread is not None and self._thread.done():
            self._thread.result()

    def _describe(self) -> str:
        """Return what is being copied and how far it is."""
        progress = self._progress
        name = self._current.folder.name if self._current else "nothing"
        return f"{name}: {progress.done_bytes / GIB:.1f} of {progress.total_bytes / GIB:.1f} GiB"

    def _copy_all(self) -> None:
        """Copy the current checkpoint and those that are added meanwhile."""
        copy = self._current
        while copy is not None:
            # An error that is no CheckpointError ends this thread. `_current` then stays, so that no other thread takes
            # its place before `watch` or `add` has raised the error.
            self._copy(copy)
            with self._lock:
                self._current = copy = self._queue.popleft() if self._queue else None

    def _copy(self, copy: _Copy) -> None:
        self._progress = TransferProgress()
        try:
            self._remote.upload(
                copy.folder, self._retention, self._progress, only_newer=copy.only_newer
            )
        except CheckpointError as error:
            self._failed = copy, error
            logger.warning(
                "%s was not uploaded, continuing with the next checkpoint: %s",
                copy.folder.name,
                error,
            )
        else:
            self._failed = None
            self._has_retried = False
