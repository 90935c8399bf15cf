"""Results of single tasks, kept while a suite runs so that one that was interrupted goes on behind them.

RUN/few_shot/SUITE/FORM/tasks/
  TASK.parquet    rows of items.parquet
  TASK.json       combined metrics, texts that were cut, and the digest of all that they depend on
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.evaluation.few_shot.items import write_items
from ul2r.evaluation.few_shot.prompting import Truncation
from ul2r.filesystem import write_atomically

FOLDER = "tasks"


@dataclass(frozen=True)
class TaskOutcome:
    """A finished task.

    Attributes:
        metrics: Its metrics over all items, with the first seed.
        truncation: Texts that were cut.
        items: File with a row for each item, metric and seed.
    """

    metrics: Mapping[str, float]
    truncation: Truncation
    items: Path


def digest_settings(*settings: Any) -> str:  # noqa: ANN401  any plain values
    """Return the SHA-256 of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class FinishedTasks:
    """The tasks of a suite that have ended.

    Args:
        folder: Folder of the suite's results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def read(self, task: str, digest: str) -> TaskOutcome | None:
        """Return a task's outcome, None if it has not ended with these settings."""
        file = self._path(task, "json")
        items = self._path(task, "parquet")
        if not file.is_file() or not items.is_file():
            return None
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["digest"] != digest:
            return None
        return TaskOutcome(tree["metrics"], Truncation(**tree["truncation"]), items)

    def write(
        self,
        task: str,
        digest: str,
        metrics: Mapping[str, float],
        truncation: Truncation,
        rows: Sequence[Mapping[str, Any]],
    ) -> TaskOutcome:
        """Keep a task's outcome."""
        items = self._path(task, "parquet")
        file = self._path(task, "json")
        # Its description comes last: what is half-written has none.
        file.unlink(missing_ok=True)
        write_items(items, rows)
        tree = {"digest": digest, "metrics": dict(metrics), "truncation": truncation.to_dict()}
        write_atomically(file, json.dumps(tree, indent=2) + "\n")
        return TaskOutcome(metrics, truncation, items)

    def _path(self, task: str, suffix: str) -> Path:
        # Names of tasks in files of users may have any characters.
        name = re.sub(r"[^\w.-]", "_", task)
        if name != task:
            name += f"-{digest_settings(task)[:8]}"
        return self.folder / f"{name}.{suffix}"
