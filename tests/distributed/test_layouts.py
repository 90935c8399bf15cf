"""Every parallel layout trains the same model, and goes on from any other's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "TP 2": {"workers": 2, "tensor": 2},
    "PP 2": {"workers": 2, "pipeline": 2},
    "DP 2": {"workers": 2},
    "TP 2 x PP 2": {"workers": 4, "tensor": 2, "pipeline": 2},
}
CAUSAL = {"mixture": "causal"}


def losses(*recipes: Recipe) -> list[dict[str, Any]]:
    """Train each recipe in turn on this rank; its losses and gradient norms, and held-out losses by step."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    results = []
    for recipe in recipes:
        tracker = MemoryTracker()
        run_worker(recipe, tracker, lambda *_: None)
        held_out = {
            step: {k: v for k, v in metrics.items() if k.startswith("held_out/")}
            for step, metrics in tracker.records
        }
        trained = {
            name: [value for _, value in tracker.series(f"train/{name}")]
            for name in ("loss", "gradient_norm")
        }
        results.append(trained | {"held_out": held_out})
    return results


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    tiny_store(folder / "store")
    return folder


def recipes(storage: Path, layout: str, **parallel: int) -> tuple[Recipe, Recipe, Recipe]:
    """A UL2R run from initial weights, one that goes on from the single process's step 3, a causal one."""
    name = layout.replace(" ", "")
    return (
        tiny_recipe(storage, name=f"new-{name}", parallel=parallel),
        tiny_recipe(storage, name=f"continued-{name}", parallel=parallel),
        tiny_recipe(storage, name=f"causal-{name}", parallel=parallel, objective=CAUSAL),
    )


@pytest.fixture(scope="module")
def single(storage: Path) -> list[dict[str, Any]]:
    """The single process's losses; its step 3 is left as the checkpoint that the others go on from."""
    half = tiny_recipe(storage, name="half", training={"steps": 3})
    whole, _, causal = recipes(storage, "single")
    (results,) = run_distributed(losses, 1, whole, half, causal)
    return list(results)


def hand_over(storage: Path, recipe: Recipe) -> None:
    """Give a run the checkpoint of the single process that stopped half-way."""
    recipe.run_folder().mkdir(parents=True)
    source = storage / "runs" / "new-single" / "checkpoints"
    target = recipe.run_folder() / "checkpoints"
    target.mkdir()
    (target / "step_00000003").symlink_to(source / "step_00000003")
    (target / "latest").write_text("step_00000003")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_single_process_losses(
    storage: Path, single: list[dict[str, Any]], layout: str
) -> None:
    parallel = LAYOUTS[layout]
    new, continued, causal = recipes(storage, layout, **parallel)
    hand_over(storage, continued)
    results = run_distributed(losses, parallel["workers"], new, continued, causal)[0]
    whole, _, whole_causal = single
    np.testing.assert_allclose(results[0]["gradient_norm"], whole["gradient_norm"], rtol=1e-3)
    np.testing.assert_allclose(results[0]["loss"], whole["loss"], rtol=1e-4)
    np.testing.assert_allclose(results[1]["loss"], whole["loss"][3:], rtol=1e-4)
    np.testing.assert_allclose(results[2]["loss"], whole_causal["loss"], rtol=1e-4)
    for step, measured in whole["held_out"].items():
        assert results[0]["held_out"][step] == pytest.approx(measured, rel=1e-4)


def test_the_first_half_of_a_run_does_not_know_its_end(single: list[dict[str, Any]]) -> None:
    """A guard of the test itself: the loss falls, so equal losses mean equal learning."""
    assert single[0]["loss"][-1] < single[0]["loss"][0] - 0.5
