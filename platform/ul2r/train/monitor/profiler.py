"""A trace of a chosen step, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ul2r.config import Recipe
from ul2r.tracking.tracker import Tracker
from ul2r.train.mesh import Mesh


@contextmanager
def profiled(recipe: Recipe, step: int, mesh: Mesh, tracker: Tracker) -> Iterator[None]:
    """Record the block on rank 0 if the recipe asks for this step; the trace goes to the run's folder and its record.

    Args:
        recipe: The run.
        step: Number of the step, from 1.
        mesh: This worker's place.
        tracker: Keeps the trace, profiles/step_<number>.json.gz.
    """
    if step not in recipe.profile.steps or not mesh.is_rank0:
        yield
        return
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with (
        profile(activities=[ProfilerActivity.CPU, *cuda]) as recorded,
        record_function(f"step {step}"),
    ):
        yield
    folder = recipe.paths.profiles
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"step_{step:08d}.json.gz"
    recorded.export_chrome_trace(str(trace))
    tracker.log_artifact(trace)
