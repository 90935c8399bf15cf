"""A step of NaN on a device is left out as on a CPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.testing.distributed import run_distributed
from ul2r.testing.gpu import gpu_recipe

pytestmark = pytest.mark.gpu

NOT_A_NUMBER = 2
"""Batch at which activations become NaN."""


@dataclass(frozen=True)
class Result:
    """Losses and skipped batches by step, and the guard's report."""

    losses: dict[int, float]
    skipped: dict[int, float]
    report: dict[str, Any]


def train(recipe: Recipe) -> Result:
    """Train on a device whose activations are NaN in one batch."""
    from ul2r.launch.worker import run_worker
    from ul2r.objective import Batch
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.step import StepResult, TrainStep

    samples_per_batch = recipe.training.global_batch_size * recipe.objective.slots_per_row

    class FaultyStep(TrainStep):
        """The real step on a faulty device."""

        def forward_backward(self, step: int, batch: Batch) -> StepResult:
            number = int(batch.sample_ids.max()) // samples_per_batch
            factor = math.nan if number == NOT_A_NUMBER else 1.0
            hook = (
                self.chunks[0]
                .decoder.layers[0]
                .register_forward_hook(lambda _, __, output: (output[0] * factor, *output[1:]))
            )
            try:
                return super().forward_backward(step, batch)
            finally:
                hook.remove()

    tracker = MemoryTracker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ul2r.train.loop.TrainStep", FaultyStep)
        run_worker(recipe, tracker)
    (report,) = tracker.artifacts
    losses, skipped = (
        dict(tracker.series(f"train/{name}")) for name in ("loss", "skipped_batches")
    )
    return Result(losses, skipped, json.loads(report.read_text(encoding="utf-8")))


def test_step_of_nan_is_left_out_as_on_the_cpu(storage: Path) -> None:
    def make_recipe(name: str, precision: str) -> Recipe:
        return gpu_recipe(
            storage,
            name=name,
            training={"precision": precision},
            optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-4},
        )

    (expected,) = run_distributed(train, 1, make_recipe("cpu", "fp32"))
    assert list(expected.losses) == [1, 2, 3, 4, 5, 6]
    assert [expected.skipped[step] for step in (2, 3, 6)] == [0, 1, 1]
    assert (expected.report["guard"], expected.report["loss"]) == ("non_finite", "nan")

    for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
        found = train(make_recipe(precision, precision))
        assert found.losses == pytest.approx(expected.losses, rel=tolerance)
        assert found.skipped == expected.skipped
        for key in ("guard", "decision", "step", "batch", "rows", "samples", "loss"):
            assert found.report[key] == expected.report[key]
        assert {
            name: norms["weight"] for name, norms in found.report["layers"].items()
        } == pytest.approx(
            {name: norms["weight"] for name, norms in expected.report["layers"].items()},
            rel=tolerance,
        )
        assert all(math.isfinite(norms["weight"]) for norms in found.report["layers"].values())
