"""Metrics and files of a run that the tracking server has not accepted yet, in memory and on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ul2r.filesystem import remove, write_atomically


class Point(NamedTuple):
    """One value of a metric; the order of the fields is the one in the file."""

    key: str
    value: float
    step: int
    rewinds: int


class Backlog:
    """A queue of metric points and one of files, for one thread that adds and one that uploads.

    The lock is held only while the queues change, so adding never waits for the network.

    Args:
        path: File that `save` writes, {"points": [[key, value, step, rewinds], ...], "files": [path, ...]}; if it
            exists, the queues start with its content.

    Attributes:
        loaded_steps: Last step of each metric in that content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._points: list[Point] = []
        self._files: list[Path] = []
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self._points = [Point(*point) for point in content["points"]]
            self._files = [Path(file) for file in content["files"]]

        self.loaded_steps: dict[str, int] = {}
        for point in self._points:
            last = self.loaded_steps.get(point.key, point.step)
            self.loaded_steps[point.key] = max(last, point.step)

    @property
    def num_points(self) -> int:
        """Points in the queue."""
        return len(self._points)

    @property
    def num_files(self) -> int:
        """Files in the queue."""
        return len(self._files)

    @property
    def is_empty(self) -> bool:
        """True if everything has been uploaded."""
        return not (self._points or self._files)

    def add_points(self, points: Sequence[Point]) -> None:
        """Append points."""
        with self._lock:
            self._points += points

    def add_file(self, file: Path) -> None:
        """Append a file."""
        with self._lock:
            self._files.append(file)

    def first_points(self, limit: int) -> list[Point]:
        """Return the oldest points, which stay in the queue."""
        with self._lock:
            # Removed only after the upload: a point that a failed upload had taken would be lost.
            return self._points[:limit]

    def first_file(self) -> Path | None:
        """Return the oldest file, which stays in the queue; None if there is none."""
        with self._lock:
            return self._files[0] if self._files else None

    def remove_points(self, count: int) -> None:
        """Remove the oldest points after they were uploaded."""
        with self._lock:
            del self._points[:count]

    def remove_file(self) -> None:
        """Remove the oldest file after it was uploaded."""
        with self._lock:
            del self._files[0]

    def save(self) -> None:
        """Write the queues to `path`; remove it if they are empty."""
        with self._lock:
            if self.is_empty:
                # What stays is read by the next attempt, which leaves out the points that the server has.
                remove(self.path)
                return
            content = {"points": self._points, "files": [str(file) for file in self._files]}
            # Losses may be NaN or infinite: Python writes and reads them, although JSON has no such numbers.
            write_atomically(self.path, json.dumps(content))
