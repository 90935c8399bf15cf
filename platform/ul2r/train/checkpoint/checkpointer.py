"""Asynchronous checkpoints of a training loop: started at one step, written in the background, published later.

All ranks take part in starting and in publishing; rank 0 alone touches the run's folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.async_write import AsyncWrite
from ul2r.train.checkpoint.checksums import FileDigest, find_damage, write_digests
from ul2r.train.checkpoint.copying import CheckpointCopies
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.sharded_state import start_save
from ul2r.train.checkpoint.storage import CheckpointStore, first_valid
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep
from ul2r.train.waiting import iter_pauses, wait_for_all

T = TypeVar("T")

logger = logging.getLogger(__name__)

REMEDY = "The previous checkpoint is intact. Free disk space and rerun the same command."

LogMetrics = Callable[[int, Mapping[str, float]], None]
"""Records metrics of a step."""


@dataclass
class _PendingSave:
    """A checkpoint that is being written.

    Attributes:
        info: Its description.
        write: This rank's part.
        start_s: When `save` was called, by time.perf_counter().
        stall_s: Time that `save` kept the loop waiting.
    """

    info: CheckpointInfo
    write: AsyncWrite
    start_s: float
    stall_s: float


class Checkpointer:
    """Saves a run's checkpoints, one at a time.

    Every rank has one and calls its methods at the same steps: they contain collectives.

    Args:
        store: The run's checkpoints.
        mesh: This rank's place.
        log: Records metrics, on rank 0.
        flush: Called on rank 0, in the background, before a checkpoint is published.
        heartbeat: Called on every rank, again and again, while what this waits for makes progress.
        asynchronous: Whether `save` returns before the checkpoint is written.
        stall_timeout_s: Time without progress after which a remote copy that is waited for counts as hanging.
    """

    def __init__(
        self,
        store: CheckpointStore,
        mesh: Mesh,
        *,
        log: LogMetrics,
        flush: Callable[[], None],
        heartbeat: Callable[[], None],
        asynchronous: bool,
        stall_timeout_s: float,
    ) -> None:
        self.store = store
        self.mesh = mesh
        self.asynchronous = asynchronous
        self._log = log
        self._flush = flush
        self._heartbeat = heartbeat
        self._pending: _PendingSave | None = None
        self._copies = (
            CheckpointCopies(store.remote, store.retention, stall_timeout_s)
            if store.remote and mesh.is_rank0
            else None
        )

    def save(self, train_step: TrainStep, info: CheckpointInfo) -> None:
        """Start a checkpoint, after waiting for the previous one.

        Raises:
            CheckpointError: If either fails on any rank, or another attempt at the run has begun.
        """
        # One at a time: a slow disk holds up the loop, instead of filling the host's memory with copies of the state.
        self.wait()
        start_s = time.perf_counter()
        # Other ranks wait for the broadcast, so none writes before the folder exists.
        self._run_on_rank0(partial(self.store.create_staging_dir, info.step))

        on_written = self._flush if self.mesh.is_rank0 else (lambda: None)
        write = translate_disk_errors(
            lambda: start_save(self.store.staging_dir(info.step), train_step, on_written)
        )
        self._pending = _PendingSave(info, write, start_s, time.perf_counter() - start_s)
        if not self.asynchronous:
            self.wait()

    def poll(self, number: int = 0) -> int:
        """Publish the pending checkpoint if every rank has written its part.

        Args:
            number: A number of the caller's, to be reduced in the same collective: polling happens at every step.

        Returns:
            The highest `number` of all ranks.

        Raises:
            CheckpointError: If a rank could not write its part.
        """
        is_writing = self._pending is not None and not self._pending.write.is_done
        highest, any_writing = self.mesh.all_reduce_max(number, is_writing)

        if self._pending is not None and not any_writing:
            self._finish(self._pending)
        return highest

    def wait(self) -> None:
        """Wait for the pending checkpoint and publish it.

        Raises:
            CheckpointError: If a rank could not write its part.
        """
        pending = self._pending
        if pending is None:
            return
        wait_for_all(
            self.mesh,
            lambda: pending.write.is_done,
            lambda: pending.write.progress,
            self._heartbeat,
        )
        self._finish(pending)

    def copy_resumed(self, folder: Path) -> None:
        """Copy the checkpoint that this attempt resumes from, unless an earlier attempt has; collective."""
        if self._copies is not None:
            self._copies.add(folder, only_newer=True)

    def close(self, *, wait_for_copies: bool = True) -> None:
        """Publish the last checkpoint and wait for the copies.

        Args:
            wait_for_copies: False for a run that is asked to stop, which may be killed soon: the next attempt copies
                the checkpoint that it resumes from.

        Raises:
            CheckpointError: If it cannot be written or copied.
        """
        self.wait()
        if not wait_for_copies:
            if self._copies is not None:
                self._copies.leave()
            return
        if self.store.remote is None:
            return
        for pause in iter_pauses():
            # `watch` has a limit of its own for copies that hang, so each answer counts as progress.
            if not self.mesh.broadcast_from_rank0(
                lambda: self._copies is not None and self._copies.watch()
            ):
                break
            self._heartbeat()
            time.sleep(pause)
        self._run_on_rank0(self.store.remove_expired)

    def close_diverged(self) -> None:
        """Publish and copy the last checkpoint of a run that a guard stops.

        What fails is logged, since the run ends with the guard's error.
        """
        try:
            self.close()
        except CheckpointError as error:
            if self.mesh.is_rank0:
                logger.warning("%s", error)

    def latest_valid(self, store: CheckpointStore) -> Path | None:
        """Return the newest valid checkpoint, as `storage.latest_valid` does; the ranks share the reading.

        Raises:
            CheckpointError: If there are checkpoints but no valid one.
        """
        rank = self.mesh.rank
        num_ranks = self.mesh.parallel.num_workers

        def find_damage_of_any_part(path: Path) -> str | None:
            found = self.mesh.all_gather(find_damage(path, part=rank, num_parts=num_ranks))
            return next((damage for damage in found if damage), None)

        # Listed by rank 0 alone: on a network file system ranks may see different listings, and then call different
        # collectives.
        return first_valid(
            self.mesh.broadcast_from_rank0(store.list_checkpoints),
            find_damage_of_any_part,
            lambda: self.mesh.broadcast_from_rank0(store.restore),
            quiet=not self.mesh.is_rank0,
        )

    def _finish(self, pending: _PendingSave) -> None:
        start_s = time.perf_counter()
        info = pending.info
        # Cleared first, so that no later call waits for a checkpoint that failed.
        self._pending = None

        # As text, since exceptions may not be picklable.
        errors = self.mesh.all_gather(_describe_error(pending.write.wait()))
        failed = [error for error in errors if error]
        if failed:
            self._run_on_rank0(partial(self.store.discard, info.step))
            raise CheckpointError(
                f"checkpoint of step {info.step} cannot be written to {self.store.folder}: {failed[0]}. {REMEDY}"
            )

        digests = self.mesh.all_gather(translate_disk_errors(pending.write.finalize))
        self._run_on_rank0(partial(self._publish, pending, digests, start_s))

    def _publish(
        self, pending: _PendingSave, digests: list[dict[str, FileDigest]], start_s: float
    ) -> None:
        """Complete the checkpoint's folder and publish it, on rank 0 after all ranks have written.

        Args:
            pending: The checkpoint.
            digests: Digests of the files that each rank wrote.
            start_s: When the loop began to wait for this, by time.perf_counter().
        """
        step = pending.info.step
        staging = self.store.staging_dir(step)
        pending.info.write(staging)
        known = {name: digest for part in digests for name, digest in part.items()}
        # Last, so that the digests cover the description too.
        num_bytes = write_digests(staging, known)

        # Old checkpoints are removed, except for one that is still being copied: copies never hold up training.
        if self._copies is None:
            self.store.publish(step)
        else:
            self._copies.add(self.store.publish(step, self._copies.give_up))

        now_s = time.perf_counter()
        self._log(
            step,
            {
                "checkpoint/save_seconds": now_s - pending.start_s,
                "checkpoint/stall_seconds": pending.stall_s + now_s - start_s,
                "checkpoint/bytes": float(num_bytes),
            },
        )

    def _run_on_rank0(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; an error there is raised on every rank."""
        # Translated, since the broadcast passes on user errors only: any other would end rank 0 while the others wait.
        self.mesh.broadcast_from_rank0(lambda: translate_disk_errors(action))


def translate_disk_errors(work: Callable[[], T]) -> T:
    """Run `work` and turn errors of the disk into one line.

    Other errors, such as a lost rank, pass through: they are not the user's, and the run is restarted after them.

    Raises:
        CheckpointError: If a file cannot be written.
    """
    try:
        return work()
    except (OSError, RuntimeError) as error:
        # torch's writer raises a RuntimeError when the disk is full.
        reason = _find_disk_error(error)
        if reason is None:
            raise
        raise CheckpointError(f"checkpoint cannot be written: {reason}. {REMEDY}") from error


def _describe_error(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return _find_disk_error(error) or " ".join(str(error).split()) or type(error).__name__


def _find_disk_error(error: BaseException) -> str | None:
    """Return the system's message about a file, None if the error has another reason."""
    cause: BaseException | None = error
    while cause is not None:
        # ConnectionError is an OSError too, raised when another rank is gone.
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
            return cause.strerror or str(cause)
        # torch.save raises a RuntimeError that does not say why the write failed.
        if "PytorchStreamWriter failed" in str(cause):
            return "a write failed, as on a full disk"
        cause = cause.__cause__ or cause.__context__
    return None
