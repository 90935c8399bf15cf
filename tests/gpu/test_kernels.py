"""Fused kernels train as plain operators do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.launch.worker import run_worker
from ul2r.testing.gpu import gpu_recipe
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu

KERNELS = ("swiglu", "rope", "optimizer", "loss")


def train(
    storage: Path, name: str, precision: str, kernels: dict[str, str]
) -> dict[str, list[float]]:
    """Train; return losses, held-out ones included, and gradient norms by name, in the order of the steps."""
    recipe = gpu_recipe(
        storage,
        name=name,
        kernels=kernels,
        training={"precision": precision},
        optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-4},
    )
    tracker = MemoryTracker()
    run_worker(recipe, tracker)
    names = {name for _, metrics in tracker.records for name in metrics}
    return {
        name: [value for _, value in tracker.series(name)]
        for name in sorted(names)
        if "loss" in name or name == "train/grad_norm"
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_fused_kernels_train_as_plain_ones(storage: Path, precision: str, tolerance: float) -> None:
    """All kernels together; in fp32 without the loss, whose fused kernel has gradients in bf16."""
    plain = dict.fromkeys(KERNELS, "plain")
    fused = dict.fromkeys(KERNELS, "fused") | ({"loss": "plain"} if precision == "fp32" else {})
    expected = train(storage, "plain", precision, plain)
    found = train(storage, "fused", precision, fused)
    assert len(expected["train/loss"]) == 6
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=tolerance), name
