"""What training needs of a tracker, and the one that keeps everything in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended; the words are MLflow's."""


class Tracker(Protocol):
    """Takes a run's metrics."""

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Record `metrics` at `step`; may buffer, must not wait for a network.

        Args:
            step: Step of the run.
            metrics: Values by name.
            rewinds: How often the run has gone back; what it logs of a step afterwards stands for the step.
        """

    def log_artifact(self, file: Path) -> None:
        """Keep a file of the run's folder, which stays there, among the run's artifacts; must not wait either."""

    def flush(self) -> None:
        """Write what is buffered, as well as the network allows.

        Called before a checkpoint is made valid: a run that resumes there does not log the steps before it again.
        """

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Write what is buffered and end the run; a second call does nothing."""


class MemoryTracker:
    """A tracker for tests and for runs that nobody records.

    Attributes:
        records: (step, metrics) in the order logged.
        artifacts: Files to keep.
        status: How the run ended, None while it runs.
    """

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.artifacts: list[Path] = []
        self.status: RunStatus | None = None

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:  # noqa: ARG002  all records are kept
        """Keep a copy of `metrics`."""
        assert self.status is None, "logged after close"
        self.records.append((step, dict(metrics)))

    def log_artifact(self, file: Path) -> None:
        """Remember the file's place."""
        self.artifacts.append(file)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Remember `status`."""
        if self.status is None:
            self.status = status

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in the order logged."""
        return [(step, values[metric]) for step, values in self.records if metric in values]
