"""Every parallel layout trains the same model, and goes on from any other's checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"workers": 2, "tensor": 2},
    "TP 2 x SP": {"workers": 2, "tensor": 2, "sequence_parallel": True},
    "PP 2": {"workers": 2, "pipeline": 2},
    "PP 2 x VP 2": {"workers": 2, "pipeline": 2, "virtual_stages": 2},
    "DP 2": {"workers": 2},
    "TP 2 x PP 2 x SP": {"workers": 4, "tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "PP 2 x VP 2 x DP 2": {"workers": 4, "pipeline": 2, "virtual_stages": 2},
}
CAUSAL = {"mixture": "causal"}
Result = dict[str, Any]


def losses(*recipes: Recipe) -> list[Result]:
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
            if any(name.startswith("held_out/") for name in metrics)
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


def recipes(
    storage: Path, layout: str, parallel: Mapping[str, Any]
) -> tuple[Recipe, Recipe, Recipe]:
    """A UL2R run, the same continued from the single process's step 3, and a causal run."""

    def recipe(kind: str, **changes: object) -> Recipe:
        name = f"{kind} {layout}".replace(" ", "-")
        return tiny_recipe(storage, name=name, parallel=parallel, **changes)

    return (
        recipe("new"),
        recipe("continued", evaluation=CAUSAL),
        recipe("causal", objective=CAUSAL, evaluation=CAUSAL),
    )


def hand_over(source: Recipe, target: Recipe) -> None:
    """Let a run begin with another's checkpoint of step 3, as if it had been stopped there."""
    folder = target.run_folder() / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step_00000003").symlink_to(source.run_folder() / "checkpoints" / "step_00000003")
    (folder / "latest").write_text("step_00000003")


@pytest.fixture(scope="module")
def single(storage: Path) -> tuple[Result, Result]:
    """The single process's UL2R and causal run."""
    new, _, causal = recipes(storage, "single", {})
    ((whole, whole_causal),) = run_distributed(losses, 1, new, causal)
    return whole, whole_causal


@pytest.fixture(scope="module")
def layouts(storage: Path, single: tuple[Result, Result]) -> dict[str, list[Result]]:
    """What each layout gave for its three `recipes`; those of as many workers share their processes."""
    source, _, _ = recipes(storage, "single", {})
    results = {}
    for workers in sorted({parallel["workers"] for parallel in LAYOUTS.values()}):
        planned = {
            layout: recipes(storage, layout, parallel)
            for layout, parallel in LAYOUTS.items()
            if parallel["workers"] == workers
        }
        for _, continued, _ in planned.values():
            hand_over(source, continued)
        given = run_distributed(losses, workers, *itertools.chain(*planned.values()))[0]
        for number, layout in enumerate(planned):
            results[layout] = given[3 * number : 3 * number + 3]
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_single_process_losses(
    single: tuple[Result, Result], layouts: dict[str, list[Result]], layout: str
) -> None:
    whole, whole_causal = single
    new, _, causal = layouts[layout]
    np.testing.assert_allclose(new["loss"], whole["loss"], rtol=1e-4)
    np.testing.assert_allclose(new["gradient_norm"], whole["gradient_norm"], rtol=1e-3)
    np.testing.assert_allclose(causal["loss"], whole_causal["loss"], rtol=1e-4)
    for step, measured in whole["held_out"].items():
        assert new["held_out"][step] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_continues_the_single_process_checkpoint(
    single: tuple[Result, Result], layouts: dict[str, list[Result]], layout: str
) -> None:
    np.testing.assert_allclose(layouts[layout][1]["loss"], single[0]["loss"][3:], rtol=1e-4)


def test_single_process_continues_the_checkpoint_of_any_layout(
    storage: Path, single: tuple[Result, Result], layouts: dict[str, list[Result]]
) -> None:
    continued = []
    for layout, parallel in LAYOUTS.items():
        continued.append(
            tiny_recipe(storage, name=f"back {layout}".replace(" ", "-"), evaluation=CAUSAL)
        )
        hand_over(recipes(storage, layout, parallel)[0], continued[-1])
    (results,) = run_distributed(losses, 1, *continued)
    assert len(results) == len(layouts)
    for result in results:
        np.testing.assert_allclose(result["loss"], single[0]["loss"][3:], rtol=1e-4)


def test_a_resumed_run_is_the_same_run_bit_for_bit(storage: Path) -> None:
    """Two replicas, sharded optimizer state: steps 4 to 6 after a restart equal those without one."""
    whole = tiny_recipe(storage, name="whole", parallel={"workers": 2})
    resumed = tiny_recipe(storage, name="resumed", parallel={"workers": 2})
    (first,) = run_distributed(losses, 2, whole)[0]
    hand_over(whole, resumed)
    (second,) = run_distributed(losses, 2, resumed)[0]
    assert second["loss"] == first["loss"][3:]
    assert second["gradient_norm"] == first["gradient_norm"][3:]


def test_the_loss_falls(single: tuple[Result, Result]) -> None:
    """A guard of the tests above: equal losses mean equal learning only if there is some."""
    assert single[0]["loss"][-1] < single[0]["loss"][0] - 0.5
