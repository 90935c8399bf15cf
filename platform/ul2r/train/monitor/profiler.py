"""Traces of chosen steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ul2r.config import Recipe
from ul2r.objective.batch import Batch
from ul2r.tracking.tracker import Tracker
from ul2r.train.callbacks import Callback
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.guards import Anomaly
from ul2r.train.step import StepResult


class Profiler(Callback):
    """Records the recipe's `profile.steps` on rank 0, without their wait for data.

    Traces are written to profiles/step_<number>.json.gz in the run's folder and logged as artifacts.

    Args:
        recipe: The run.
        mesh: Position of this rank.
        tracker: Tracker that takes the traces.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, tracker: Tracker) -> None:
        self._steps = recipe.profile.steps if mesh.is_rank0 else ()
        self._folder: Path = recipe.paths.profiles
        self._tracker = tracker
        self._recording = ExitStack()  # open from one hook to the other

    def on_step_begin(self, step: int) -> None:
        """Start to record a chosen step."""
        if step not in self._steps:
            return
        # torch warns of an activity for which there is no device.
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = self._recording.enter_context(
            profile(activities=[ProfilerActivity.CPU, *cuda])
        )
        self._recording.enter_context(record_function(f"step {step}"))

    def on_step_end(
        self, step: int, batch: Batch, result: StepResult, anomaly: Anomaly | None
    ) -> None:
        """Stop to record, and write the trace."""
        del batch, result, anomaly
        if step not in self._steps:
            return
        # First, since only a finished profile can be exported.
        self._recording.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"step_{step:08d}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._tracker.log_artifact(trace)

    def close(self) -> None:
        """Stop to record a step that failed."""
        self._recording.close()
