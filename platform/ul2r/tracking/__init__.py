"""Tracking of runs: the Tracker protocol, an implementation in memory and one on MLflow."""

from ul2r.tracking.tracker import MemoryTracker, RunStatus, Tracker

__all__ = ["MemoryTracker", "RunStatus", "Tracker"]
