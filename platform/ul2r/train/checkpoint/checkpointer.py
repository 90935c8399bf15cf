"""Checkpoints of a running loop: begun at a step, written behind it, finished at a later one by all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.async_write import BackgroundWrite
from ul2r.train.checkpoint.checksums import Digest, find_damage, write_digests
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.sharded_state import begin_save
from ul2r.train.checkpoint.storage import CheckpointStore, first_valid
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep

T = TypeVar("T")

logger = logging.getLogger(__name__)

REMEDY = (
    "; the one before it is as it was: make room or mend the disk, then run the same command again"
)

Log = Callable[[int, Mapping[str, float]], None]
"""Takes metrics of a step."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    info: CheckpointInfo
    write: BackgroundWrite
    began: float
    stall_s: float


class Saver:
    """Saves a run's checkpoints, one at a time; every rank has one and calls it at the same steps.

    Args:
        store: The run's checkpoints.
        mesh: This rank's place.
        log: Takes metrics, on rank 0.
        flush: Called on rank 0, in the background, before a checkpoint becomes the last one.
        asynchronous: Whether `save` returns before the checkpoint is finished.
    """

    def __init__(
        self,
        store: CheckpointStore,
        mesh: Mesh,
        *,
        log: Log,
        flush: Callable[[], None],
        asynchronous: bool,
    ) -> None:
        self.store, self.mesh, self.asynchronous = store, mesh, asynchronous
        self._log, self._flush = log, flush
        self._pending: _Pending | None = None
        self._copies = _Copies(store) if store.mirror and mesh.is_rank0 else None

    def save(self, train_step: TrainStep, info: CheckpointInfo) -> None:
        """Begin a checkpoint, after the one before it is finished.

        Raises:
            CheckpointError: If either fails on any rank, or another attempt at the run has begun.
        """
        self.wait()
        began = time.perf_counter()
        self._on_first(partial(self.store.open, info.step))
        last = self._flush if self.mesh.is_rank0 else (lambda: None)
        write = _told(lambda: begin_save(self.store.beside(info.step), train_step, last))
        self._pending = _Pending(info, write, began, time.perf_counter() - began)
        if not self.asynchronous:
            self.wait()

    def poll(self, number: int = 0) -> int:
        """Finish the checkpoint if every rank has written its part.

        Args:
            number: Sent along in the same message.

        Returns:
            The highest `number` of all ranks.

        Raises:
            CheckpointError: If a rank could not write its part.
        """
        busy = self._pending is not None and not self._pending.write.done
        copying = self._copies is not None and self._copies.busy
        highest, unready = self.mesh.all_reduce_max(number, busy or copying)
        if self._pending is not None and not unready:
            self._finish(self._pending)
        return highest

    def wait(self) -> None:
        """Wait for the checkpoint that is being written and finish it.

        Raises:
            CheckpointError: If a rank could not write its part.
        """
        if self._pending is not None:
            self._finish(self._pending)

    def close(self) -> None:
        """Wait for the last checkpoint, and for its copy.

        Raises:
            CheckpointError: If it cannot be written or copied.
        """
        self.wait()
        self._on_first(self._copies.close if self._copies else lambda: None)

    def latest_valid(self, store: CheckpointStore) -> Path | None:
        """What `storage.latest_valid` gives, the reading shared between all ranks."""
        rank, ranks = self.mesh.rank, self.mesh.parallel.num_workers

        def damage_of(path: Path) -> str | None:
            found = self.mesh.all_gather(find_damage(path, part=rank, parts=ranks))
            return next((damage for damage in found if damage), None)

        return first_valid(
            self.mesh.broadcast_from_rank0(store.candidates),
            damage_of,
            lambda: self.mesh.broadcast_from_rank0(store.restore),
            quiet=not self.mesh.is_rank0,
        )

    def _finish(self, pending: _Pending) -> None:
        began = time.perf_counter()
        self._pending, info = None, pending.info
        failed = [text for text in self.mesh.all_gather(_failure(pending.write.wait())) if text]
        if failed:
            self._on_first(partial(self.store.abandon, info.step))
            raise CheckpointError(
                f"checkpoint of step {info.step} cannot be written to {self.store.folder}: {failed[0]}{REMEDY}"
            )
        digests = self.mesh.all_gather(_told(pending.write.describe))
        self._on_first(partial(self._conclude, info, digests, pending, began))

    def _conclude(
        self,
        info: CheckpointInfo,
        digests: list[dict[str, Digest]],
        pending: _Pending,
        began: float,
    ) -> None:
        """What rank 0 does when all have written."""
        beside = self.store.beside(info.step)
        info.write(beside)
        size = write_digests(
            beside, {name: digest for part in digests for name, digest in part.items()}
        )
        if self._copies:
            self._copies.wait()  # which may be of one that is to be removed now
        final = self.store.finish(info.step)
        if self._copies:
            self._copies.begin(final)
        now = time.perf_counter()
        self._log(
            info.step,
            {
                "checkpoint/save_seconds": now - pending.began,
                "checkpoint/stall_seconds": pending.stall_s + now - began,
                "checkpoint/bytes": float(size),
            },
        )

    def _on_first(self, action: Callable[[], None]) -> None:
        """Do something on rank 0; where it fails, every rank fails."""
        self.mesh.broadcast_from_rank0(lambda: _told(action))


class _Copies:
    """Copies of finished checkpoints, made one after the other by a thread of rank 0."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-copy")
        self._copying: tuple[Path, Future[None]] | None = None

    @property
    def busy(self) -> bool:
        return self._copying is not None and not self._copying[1].done()

    def begin(self, folder: Path) -> None:
        assert self._store.mirror is not None
        put = self._store.mirror.put
        self._copying = folder, self._pool.submit(put, folder, self._store.retention)

    def wait(self) -> None:
        """Wait for the copy that is being made; one that failed is made up for by the next."""
        if self._copying is None:
            return
        folder, copied = self._copying
        error = copied.exception()
        if isinstance(error, CheckpointError):
            logger.warning("%s was not copied, the next checkpoint will be: %s", folder.name, error)
        elif error is not None:
            raise error
        self._copying = None

    def close(self) -> None:
        """Wait for the last copy, which is tried twice."""
        if self._copying is None:
            return
        folder, copied = self._copying
        if copied.exception() is not None:
            self.wait()
            self.begin(folder)
            _, copied = self._copying
        copied.result()
        self._pool.shutdown()


def _told(work: Callable[[], T]) -> T:
    """Do something with files; where the disk refuses, that is told in one line.

    Anything else, such as a rank that is gone, is no mistake of the user's: the run is started again for it.
    """
    try:
        return work()
    except (OSError, RuntimeError) as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise CheckpointError(f"checkpoint cannot be written: {reason}{REMEDY}") from error


def _failure(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return _disk_reason(error) or " ".join(str(error).split()) or type(error).__name__


def _disk_reason(error: BaseException) -> str | None:
    """What the system said of a file, also where Torch's own error hides it; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
            return cause.strerror or str(cause)
        if "PytorchStreamWriter failed" in str(cause):
            return "a write failed, as on a full disk"
        cause = cause.__cause__ or cause.__context__
    return None
