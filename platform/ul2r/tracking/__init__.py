"""Where a run's numbers go: the Tracker protocol, one in memory, one in MLflow."""

from ul2r.tracking.tracker import MemoryTracker, RunStatus, Tracker

__all__ = ["MemoryTracker", "RunStatus", "Tracker"]
