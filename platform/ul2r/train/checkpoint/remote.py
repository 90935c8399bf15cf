"""Remote copies of a run's finished checkpoints (S3, GCS, a file server, any file system of fsspec).

URL/RUN/ has the layout of the run's checkpoint folder (layout.py), without the writer token.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from ul2r.errors import CheckpointError
from ul2r.filesystem import staging_path
from ul2r.train.checkpoint.checksums import find_damage
from ul2r.train.checkpoint.layout import DIGESTS_FILE, LATEST_FILE, list_up_to, parse_step
from ul2r.train.checkpoint.retention import Retention

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


class RemoteCheckpoints:
    """Remote copies of one run's checkpoints.

    Args:
        url: Folder or URL that holds the copies of all runs.
        run: Name of the run.
    """

    def __init__(self, url: str, run: str) -> None:
        self.url = f"{url.rstrip('/')}/{run}"

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
            if only_newer and not self._is_newer(filesystem, root, folder):
                return
            target = f"{root}/{folder.name}"

            # A copy without digests is not valid: removed first and written last, they cover an interrupted upload.
            if filesystem.exists(f"{target}/{DIGESTS_FILE}"):
                filesystem.rm_file(f"{target}/{DIGESTS_FILE}")
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

    def _is_newer(self, filesystem: Any, root: str, folder: Path) -> bool:  # noqa: ANN401
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

            for name in list_up_to(pointer, self._list_names(filesystem, root)):
                target = folder / name
                staging = staging_path(target)
                # Verified before the rename: what has a checkpoint's name on disk is complete.
                try:
                    damage = _download(filesystem, f"{root}/{name}", staging)
                    if damage is None:
                        if target.exists():
                            shutil.rmtree(target)
                        staging.rename(target)
                        return target
                finally:
                    shutil.rmtree(staging, ignore_errors=True)

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
        steps = {name: parse_step(name) for name in self._list_names(filesystem, root)}
        # Copies of later steps, which were undone on disk, do not count for retention, and are removed for the same
        # reason.
        kept = retention.select_kept(
            step for step in steps.values() if step is not None and step <= last_step
        )
        for name, step in steps.items():
            if step is not None and step not in kept:
                filesystem.rm(f"{root}/{name}", recursive=True)

    def _list_names(self, filesystem: Any, root: str) -> list[str]:  # noqa: ANN401
        # fsspec caches listings per process; another process, or an upload of this one, may have changed the folder.
        filesystem.invalidate_cache()
        paths = filesystem.ls(root, detail=False)
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    @contextmanager
    def _open(self, action: str) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the run's path in it; turn errors inside the block into one line."""
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)
            yield filesystem, root.rstrip("/")
        except (OSError, ValueError, ImportError) as error:
            # ValueError: an unknown protocol. ImportError: its package, such as s3fs, is not installed.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"checkpoints cannot be {action} {self.url}: {reason}: check checkpoints.remote_dir"
            ) from error


def _download(filesystem: Any, source: str, target: Path) -> str | None:  # noqa: ANN401
    """Download one checkpoint into a new folder and return its damage, None if it is valid."""
    target.mkdir()
    paths = filesystem.ls(source, detail=False)
    _transfer(
        lambda path: filesystem.get_file(path, str(target / path.rpartition("/")[2])),
        paths,
    )
    return find_damage(target)


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


def _put_file(filesystem: Any, source: Path, target: str, progress: TransferProgress) -> None:  # noqa: ANN401
    """Upload one file, counting its bytes on the way."""
    counter = _ByteCounter(progress)
    if isinstance(filesystem, LocalFileSystem):
        # Its own method copies a file at one go and reports nothing; that of its base class copies block by block.
        fsspec.AbstractFileSystem.put_file(filesystem, str(source), target, callback=counter)
    else:
        filesystem.put_file(str(source), target, callback=counter)
    counter.finish(source.stat().st_size)


def _transfer(copy: Callable[[T], object], files: list[T]) -> None:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        # list() raises the first error of a thread; without it errors are lost.
        list(pool.map(copy, files))
