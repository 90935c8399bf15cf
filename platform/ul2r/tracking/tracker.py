"""The Tracker protocol, and an implementation that keeps everything in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from ul2r.errors import RunInterrupted

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""Final status of a run, in MLflow's words."""


def status_after(error: BaseException) -> RunStatus:
    """Return the status of a run that an error ended."""
    return "KILLED" if isinstance(error, KeyboardInterrupt | RunInterrupted) else "FAILED"


class Tracker(Protocol):
    """Receiver of a run's metrics and files."""

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:
        """Record `metrics` at `step`; may buffer, must not wait for the network.

        Args:
            step: Step of the run.
            metrics: Values by name.
            rewinds: Number of times the run has rewound. Of a step logged under several values, the highest counts.
        """

    def log_artifact(self, file: Path) -> None:
        """Add a file to the run's artifacts; must not wait for the network.

        Args:
            file: A file of the run's folder, which stays there: it may be read later.
        """

    def flush(self) -> None:
        """Write buffered metrics as far as possible, without waiting for the network.

        Called before a checkpoint becomes valid: a run that resumes there does not log the earlier steps again.
        """

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Write buffered metrics and end the run; a second call does nothing."""


class MemoryTracker:
    """Tracker in memory, for tests and for runs without a tracking server.

    Attributes:
        records: (step, metrics) in the order logged.
        artifacts: Files in the order logged.
        status: Final status of the run, None while it is running.
    """

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.artifacts: list[Path] = []
        self.status: RunStatus | None = None

    def log(self, step: int, metrics: Mapping[str, float], rewinds: int = 0) -> None:  # noqa: ARG002  all records are kept
        """Record a copy of `metrics`."""
        assert self.status is None, "logged after close"
        self.records.append((step, dict(metrics)))

    def log_artifact(self, file: Path) -> None:
        """Record the file's path."""
        self.artifacts.append(file)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Record the status of the first call."""
        if self.status is None:
            self.status = status

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of one metric, in the order logged."""
        return [(step, values[metric]) for step, values in self.records if metric in values]
