"""Remote copies of a run's finished checkpoints (S3, GCS, a file server, any file system of fsspec).

URL/RUN/ has the layout of the run's checkpoint folder (layout.py). Its writer token is that of the attempt that copies
to it: an earlier attempt, or a run of the same name in another storage, is refused.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from ul2r.errors import CheckpointError
from ul2r.filesystem import is_transfer_error, remove, replace_dir, staging_path
from ul2r.train.checkpoint.checksums import find_damage, list_files
from ul2r.train.checkpoint.layout import (
    DIGESTS_FILE,
    LATEST_FILE,
    WRITER_TOKEN_FILE,
    lineage_of,
    list_up_to,
    parse_step,
)
from ul2r.train.checkpoint.retention import Retention
from ul2r.train.waiting import run_in_background

T = TypeVar("T")

NUM_STREAMS = 8
"""Files that are transferred at the same time."""

logger = logging.getLogger(__name__)


class TransferProgress:
    """Bytes and files that have been transferred; counted by several threads, read by another.

    Attributes:
        total_bytes: Bytes of all files.
        done_bytes: Bytes transferred so far.
        num_files: Files transferred so far.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self.done_bytes = 0
        self.num_files = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int, num_files: int = 0) -> None:
        """Count what was transferred since the last call."""
        with self._lock:
            self.done_bytes += num_bytes
            self.num_files += num_files


class _ForeignCopiesError(CheckpointError):
    """The remote folder belongs to another attempt or run."""


class RemoteCheckpoints:
    """Remote copies of one run's checkpoints.

    Args:
        url: Folder or URL that holds the copies of all runs.
        run: Name of the run.
        writer_token: Token of the attempt that uploads; None for one that only downloads.
    """

    def __init__(self, url: str, run: str, writer_token: str | None = None) -> None:
        self.url = f"{url.rstrip('/')}/{run}"
        self._writer_token = writer_token
        self._resumed: Path | None = None
        self._is_claimed = False
        self._reported: set[str] = set()

    def claim(self, resumed: Path | None) -> None:
        """Reserve the remote folder for this attempt; one that cannot be reached now is claimed by the next upload.

        Args:
            resumed: Checkpoint that this attempt resumes from, None if it begins the run.

        Raises:
            CheckpointError: If the folder has the copies of a run of the same name in another storage.
        """
        self._resumed = resumed
        try:
            with self._open("uploaded to") as (filesystem, root):
                self._check_owner(filesystem, root)
        except _ForeignCopiesError:
            raise
        except CheckpointError as error:
            logger.warning("training starts all the same: %s", error)

    def upload(
        self,
        folder: Path,
        retention: Retention,
        progress: TransferProgress | None = None,
        *,
        only_newer: bool = False,
    ) -> None:
        """Upload a finished checkpoint, make it the latest, and remove those that are not kept.

        Args:
            folder: The checkpoint.
            retention: Which copies are kept.
            progress: Counts what has been uploaded.
            only_newer: Leave a remote folder as it is whose latest checkpoint is this one or a later one.

        Raises:
            CheckpointError: If that fails; the previous latest copy is intact.
        """
        progress = progress or TransferProgress()
        with self._open("uploaded to") as (filesystem, root):
            self._check_owner(filesystem, root)
            if only_newer and not self._is_newer(filesystem, root, folder):
                return
            target = f"{root}/{folder.name}"

            # A copy without digests is not valid: emptied first and written last, they cover an interrupted upload.
            # Not removed, since a key may be allowed to write to a bucket and not to delete from it.
            if filesystem.exists(f"{target}/{DIGESTS_FILE}"):
                filesystem.pipe_file(f"{target}/{DIGESTS_FILE}", b"")
            filesystem.makedirs(target, exist_ok=True)
            files = [path for path in folder.iterdir() if path.name != DIGESTS_FILE]
            progress.total_bytes = sum(path.stat().st_size for path in files)
            _transfer(
                lambda path: _put_file(filesystem, path, f"{target}/{path.name}", progress), files
            )
            filesystem.put_file(str(folder / DIGESTS_FILE), f"{target}/{DIGESTS_FILE}")

            # Object stores have no rename, but replace an object at once.
            filesystem.pipe_file(f"{root}/{LATEST_FILE}", folder.name.encode())
            # After the switch, so that `latest` never names a copy that is gone.
            self._remove_expired(filesystem, root, folder.name, retention)

    def _check_owner(self, filesystem: Any, root: str) -> None:  # noqa: ANN401  fsspec has no types
        """Write this attempt's token, or check that it is still there.

        Raises:
            _ForeignCopiesError: If a later attempt has begun, or the copies are not this run's.
        """
        if self._writer_token is None:
            return
        place = f"{root}/{WRITER_TOKEN_FILE}"
        owner = None
        if filesystem.exists(place):
            owner = filesystem.cat_file(place).decode(errors="replace")
        if owner == self._writer_token:
            self._is_claimed = True
            return
        if self._is_claimed:
            raise _ForeignCopiesError(
                f"another attempt at this run, maybe from another storage, copies its checkpoints to {self.url}: "
                "stop one of them, or set checkpoints.remote_dir or name of one to another"
            )
        if owner is not None and self._is_foreign(filesystem, root, owner):
            raise _ForeignCopiesError(
                f"{self.url} has the copies of a run of the same name in another storage: set "
                "checkpoints.remote_dir or name to another, or delete that folder if its run is given up"
            )
        filesystem.makedirs(root, exist_ok=True)
        filesystem.pipe_file(place, self._writer_token.encode())
        self._is_claimed = True

    def _is_foreign(self, filesystem: Any, root: str, owner: str) -> bool:  # noqa: ANN401  fsspec has no types
        """Return whether the copies are those of a run that this attempt does not continue."""
        assert self._writer_token is not None
        if lineage_of(owner) == lineage_of(self._writer_token):
            return False
        # Claimed by an attempt that has not copied anything: like on disk, the later one goes on.
        if not filesystem.exists(f"{root}/{LATEST_FILE}"):
            return False
        if self._resumed is None:
            return True
        # A run that has lost its disk resumes from a copy. Digests cover checkpoint.json and its random identifier.
        copied = f"{root}/{self._resumed.name}/{DIGESTS_FILE}"
        return not (
            filesystem.exists(copied)
            and filesystem.cat_file(copied) == (self._resumed / DIGESTS_FILE).read_bytes()
        )

    def _is_newer(self, filesystem: Any, root: str, folder: Path) -> bool:  # noqa: ANN401  fsspec has no types
        if not filesystem.exists(f"{root}/{LATEST_FILE}"):
            return True
        pointer = filesystem.cat_file(f"{root}/{LATEST_FILE}").decode(errors="replace")
        latest, step = parse_step(pointer.strip()), parse_step(folder.name)
        assert step is not None, folder
        return latest is None or latest < step

    def has_checkpoint(self) -> bool:
        """Return whether there is a copy.

        Raises:
            CheckpointError: If the remote folder cannot be reached.
        """
        with self._open("downloaded from") as (filesystem, root):
            return bool(filesystem.exists(f"{root}/{LATEST_FILE}"))

    def download(self, folder: Path) -> Path:
        """Download the newest valid copy into a run's checkpoint folder.

        Args:
            folder: That folder, which exists.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: If the copies cannot be read, or none of them is valid.
        """
        damaged: list[str] = []
        with self._open("downloaded from") as (filesystem, root):
            pointer = filesystem.cat_file(f"{root}/{LATEST_FILE}").decode(errors="replace")

            for name in list_up_to(pointer, _list_names(filesystem, root)):
                target = folder / name
                staging = staging_path(target)
                # Verified before the rename: what has a checkpoint's name on disk is complete.
                try:
                    damage = _download(filesystem, f"{root}/{name}", staging)
                    if damage is None:
                        replace_dir(staging, target)
                        return target
                finally:
                    remove(staging)

                damaged.append(f"{name}: {damage}")
                logger.warning(
                    "remote copy %s/%s is damaged (%s): trying an earlier one",
                    self.url,
                    name,
                    damage,
                )
        raise CheckpointError(f"{self.url}: no valid copy is left ({'; '.join(damaged)})")

    def _remove_expired(
        self,
        filesystem: Any,  # noqa: ANN401  fsspec has no types
        root: str,
        latest: str,
        retention: Retention,
    ) -> None:
        last_step = parse_step(latest)
        assert last_step is not None
        steps = {name: parse_step(name) for name in _list_names(filesystem, root)}
        # Copies of later steps, which were undone on disk, do not count for retention, and are removed for the same
        # reason.
        kept = retention.select_kept(
            step for step in steps.values() if step is not None and step <= last_step
        )
        for name, step in steps.items():
            if step is not None and step not in kept:
                self._remove(filesystem, root, name)

    def _remove(self, filesystem: Any, root: str, name: str) -> None:  # noqa: ANN401  fsspec has no types
        """Remove a copy as far as possible: it is tried again after the next upload, and said once."""
        try:
            filesystem.rm(f"{root}/{name}", recursive=True)
        except Exception as error:
            if not is_transfer_error(error):
                raise
            if name not in self._reported:
                self._reported.add(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning("the old copy %s/%s cannot be removed: %s", self.url, name, reason)

    @contextmanager
    def _open(self, action: str) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the run's path in it; turn errors inside the block into one line."""
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)
            yield filesystem, root.rstrip("/")
        except Exception as error:
            if isinstance(error, CheckpointError) or not is_transfer_error(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"checkpoints cannot be {action} {self.url}: {reason}: check checkpoints.remote_dir"
            ) from error


def _download(filesystem: Any, source: str, target: Path) -> str | None:  # noqa: ANN401  fsspec has no types
    """Download one checkpoint into a new folder and return its damage, None if it is valid."""
    target.mkdir()
    if not filesystem.exists(source):
        return "does not exist"
    found = set(_list_names(filesystem, source))

    def get_files(names: Iterable[str]) -> None:
        _transfer(
            lambda name: filesystem.get_file(f"{source}/{name}", str(target / name)),
            sorted(found.intersection(names)),
        )

    get_files([DIGESTS_FILE])
    # No others: they could not be verified.
    get_files(list_files(target))
    return find_damage(target)


def _list_names(filesystem: Any, root: str) -> list[str]:  # noqa: ANN401  fsspec has no types
    # fsspec caches listings per process; another process, or an upload of this one, may have changed the folder.
    filesystem.invalidate_cache()
    paths = filesystem.ls(root, detail=False)
    return [path.rstrip("/").rpartition("/")[2] for path in paths]


class _ByteCounter(Callback):  # type: ignore[misc]  # fsspec has no types
    """Passes the bytes that fsspec has transferred of one file on to a `TransferProgress`."""

    def __init__(self, progress: TransferProgress) -> None:
        super().__init__()
        self._progress = progress
        self._num_counted = 0

    def call(self, *_: object, **__: object) -> None:
        """Count; fsspec calls it after each change of `value`, the bytes transferred so far."""
        self._progress.add(self.value - self._num_counted)
        self._num_counted = self.value

    def finish(self, num_bytes: int) -> None:
        """Count what a file system did not report."""
        self._progress.add(num_bytes - self._num_counted, num_files=1)


def _put_file(filesystem: Any, source: Path, target: str, progress: TransferProgress) -> None:  # noqa: ANN401  fsspec has no types
    """Upload one file, counting its bytes on the way."""
    counter = _ByteCounter(progress)
    if isinstance(filesystem, LocalFileSystem):
        # Its own method copies a file at one go and reports nothing; that of its base class copies block by block.
        fsspec.AbstractFileSystem.put_file(filesystem, str(source), target, callback=counter)
    else:
        filesystem.put_file(str(source), target, callback=counter)
    counter.finish(source.stat().st_size)


def _transfer(copy: Callable[[T], object], files: list[T]) -> None:
    """Copy files, several at a time; after an error begin no other and raise it.

    Not in a `ThreadPoolExecutor`: Python waits for its threads before a process ends, and a run that is asked to stop
    waits for no copy.
    """
    waiting = deque(files)
    lock = threading.Lock()

    def copy_waiting() -> None:
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    file = waiting.popleft()
                copy(file)
        except BaseException:
            with lock:
                waiting.clear()
            raise

    streams = [run_in_background(copy_waiting, "checkpoint-transfer") for _ in range(NUM_STREAMS)]
    wait(streams)
    for stream in streams:
        stream.result()
