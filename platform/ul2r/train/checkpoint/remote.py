"""Copies of a run's finished checkpoints elsewhere (S3, GCS, a file server, whatever fsspec knows).

URL/RUN/
  step_00000100/   as on disk; digests.json is written last
  latest           the name of the last whole one
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.checksums import DIGESTS_FILE, find_damage
from ul2r.train.checkpoint.retention import Retention, finished_up_to, name_of, step_of

STREAMS = 8
"""Files that are copied at the same time."""

logger = logging.getLogger(__name__)


class Mirror:
    """The copies of one run's checkpoints.

    Args:
        url: Folder or URL that holds the copies of all runs.
        run: Name of the run.
    """

    def __init__(self, url: str, run: str) -> None:
        self.url = f"{url.rstrip('/')}/{run}"

    def put(self, folder: Path, retention: Retention) -> None:
        """Copy a finished checkpoint, let it be the last one, and remove those that are kept no longer.

        Raises:
            CheckpointError: If that fails; what was the last one is still there.
        """
        with self._opened("be copied to") as (files, root):
            target = f"{root}/{folder.name}"
            if files.exists(f"{target}/{DIGESTS_FILE}"):
                files.rm_file(f"{target}/{DIGESTS_FILE}")  # until it is whole, it counts no more
            files.makedirs(target, exist_ok=True)
            names = [path.name for path in folder.iterdir() if path.name != DIGESTS_FILE]
            _each(lambda name: files.put_file(str(folder / name), f"{target}/{name}"), names)
            files.put_file(str(folder / DIGESTS_FILE), f"{target}/{DIGESTS_FILE}")
            files.pipe_file(f"{root}/latest", folder.name.encode())
            names = self._names(files, root)
            kept = retention.kept(
                step for name in names if (step := step_of(name)) <= step_of(folder.name)
            )
            for name in names:
                if step_of(name) not in kept:
                    files.rm(f"{root}/{name}", recursive=True)

    def holds_any(self) -> bool:
        """Whether there is a copy.

        Raises:
            CheckpointError: If the place cannot be reached.
        """
        with self._opened("be fetched from") as (files, root):
            return bool(files.exists(f"{root}/latest"))

    def fetch(self, into: Path) -> Path:
        """Copy the last whole checkpoint back to a run's `checkpoints`.

        Args:
            into: That folder, which is there.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: If the copies cannot be read, or none of them is whole.
        """
        damaged: list[str] = []
        with self._opened("be fetched from") as (files, root):
            for name in self._candidates(files, root):
                beside = into / f"{name}.{uuid.uuid4().hex}.writing"
                try:
                    damage = _fetch(files, f"{root}/{name}", beside)
                    if damage is None:
                        if (into / name).exists():
                            shutil.rmtree(into / name)
                        beside.rename(into / name)
                        return into / name
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
                damaged.append(f"{name}: {damage}")
                logger.warning(
                    "copy %s/%s is damaged (%s): trying an earlier one", self.url, name, damage
                )
        raise CheckpointError(f"{self.url}: no whole copy is left ({'; '.join(damaged)})")

    def _candidates(self, files: Any, root: str) -> list[str]:  # noqa: ANN401  fsspec has no types
        """Names of the copies that may be whole, newest first."""
        pointer = files.cat_file(f"{root}/latest").decode(errors="replace")
        return finished_up_to(pointer, self._names(files, root))

    def _names(self, files: Any, root: str) -> list[str]:  # noqa: ANN401
        files.invalidate_cache()
        names = (entry.rstrip("/").rpartition("/")[2] for entry in files.ls(root, detail=False))
        return [name for name in names if name == name_of(step_of(name))]

    @contextmanager
    def _opened(self, doing: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path of this run in it; what goes wrong there is told in one line."""
        try:
            files, root = fsspec.core.url_to_fs(self.url)
            yield files, root.rstrip("/")
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"checkpoints cannot {doing} {self.url}: {reason}") from error


def _fetch(files: Any, source: str, beside: Path) -> str | None:  # noqa: ANN401
    """Copy one checkpoint back; what is wrong with it, None if nothing is."""
    beside.mkdir()
    paths = files.ls(source, detail=False)
    _each(lambda path: files.get_file(path, str(beside / path.rpartition("/")[2])), paths)
    return find_damage(beside)


def _each(work: Callable[[str], object], names: list[str]) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(work, names))
