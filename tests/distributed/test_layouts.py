"""Every parallel layout trains the same model, and resumes from the checkpoint of any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

pytestmark = pytest.mark.distributed

SMALL_BUCKET = 3000
"""Parameters; a layer has about 9,000."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"num_workers": 2, "tensor": 2},
    "TP 2 x SP": {"num_workers": 2, "tensor": 2, "sequence_parallel": True},
    "PP 2": {"num_workers": 2, "pipeline": 2},
    "PP 2 x VP 2": {"num_workers": 2, "pipeline": 2, "virtual_stages": 2},
    "PP 3 x VP 2 x ends": {
        "num_workers": 3,
        "pipeline": 3,
        "virtual_stages": 2,
        "account_for_embedding_and_loss": True,  # chunks of 0, 1, 1, 1, 1 and 0 layers
    },
    "DP 2": {"num_workers": 2},
    "TP 2 x PP 2 x SP": {"num_workers": 4, "tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "PP 2 x VP 2 x DP 2": {
        "num_workers": 4,
        "pipeline": 2,
        "virtual_stages": 2,
        "overlap_param_gather": True,
        "bucket_size": SMALL_BUCKET,
    },
}
LAYOUTS_OF_CAUSAL = ("single", "TP 2 x SP", "PP 2")
LAYOUTS_OF_WINDOWS = ("single", "TP 2 x SP", "PP 2 x VP 2")
CAUSAL = {"mixture": "causal"}
Result = dict[str, Any]


def train(*recipes: Recipe) -> list[Result]:
    """Train each recipe in turn on this rank.

    Returns:
        Losses, gradient norms, held-out losses by step, the number of gradient buckets, and how many masks were made.
    """
    from ul2r.launch.worker import run_worker
    from ul2r.model.attention import DenseMask
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.loop import Trainer

    num_buckets = []
    num_masks: list[int] = []
    prepare = DenseMask.prepare

    def count_mask(*arguments: Any) -> Any:  # noqa: ANN401  those of `DenseMask.prepare`
        num_masks[-1] += 1
        return prepare(*arguments)

    class CountingTrainer(Trainer):
        def fit(self, *source: Any) -> Any:  # noqa: ANN401  as there
            groups = [group for chunk in self.train_step.model for group in chunk.bucket_groups]
            num_buckets.append(sum(len(group.buckets) for group in groups))
            return super().fit(*source)

    pytest.MonkeyPatch().setattr("ul2r.launch.worker.Trainer", CountingTrainer)
    pytest.MonkeyPatch().setattr(DenseMask, "prepare", count_mask)
    results = []
    for recipe in recipes:
        num_masks.append(0)
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        held_out = {
            step: {k: v for k, v in metrics.items() if k.endswith("/held_out_loss")}
            for step, metrics in tracker.records
            if any(name.endswith("/held_out_loss") for name in metrics)
        }
        trained = {
            name: [value for _, value in tracker.series(f"train/{name}")]
            for name in ("loss", "grad_norm")
        }
        counts = {"num_buckets": num_buckets[-1], "num_masks": num_masks[-1]}
        results.append(trained | counts | {"held_out": held_out})
    return results


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    make_tiny_store(folder / "store")
    return folder


def make_recipes(storage: Path, layout: str, parallel: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return a UL2R run, and the same continued from step 3 of the single process.

    Some layouts also have a causal run, and some a run of a model with sliding windows, whose activations are
    recomputed in all layouts but the single process.
    """

    def recipe(kind: str, **changes: object) -> Recipe:
        name = f"{kind} {layout}".replace(" ", "-")
        return tiny_recipe(storage, name=name, parallel=parallel, **changes)

    made = {"new": recipe("new"), "continued": recipe("continued", evaluation=CAUSAL)}
    if layout in LAYOUTS_OF_CAUSAL:
        made["causal"] = recipe("causal", objective=CAUSAL, evaluation=CAUSAL)
    if layout in LAYOUTS_OF_WINDOWS:
        recompute = "full" if parallel else "none"
        made["windows"] = recipe(
            "windows", model=GEMMA_3, training={"recompute": recompute}, evaluation=CAUSAL
        )
    return made


def hand_over(source: Recipe, target: Recipe) -> None:
    """Give a run another one's checkpoint of step 3, as if it had been stopped there."""
    folder = target.paths.checkpoints
    folder.mkdir(parents=True)
    (folder / "step_00000003").symlink_to(source.paths.checkpoints / "step_00000003")
    (folder / "latest").write_text("step_00000003")


@pytest.fixture(scope="module")
def single(storage: Path) -> dict[str, Result]:
    """Results of the single process by kind of run."""
    made = make_recipes(storage, "single", {})
    del made["continued"]
    return dict(zip(made, run_distributed(train, 1, *made.values())[0], strict=True))


@pytest.fixture(scope="module")
def layouts(storage: Path, single: dict[str, Result]) -> dict[str, dict[str, Result]]:
    """Results of each layout by kind of run; layouts with the same number of workers share their processes."""
    source = make_recipes(storage, "single", {})["new"]
    results: dict[str, dict[str, Result]] = {}
    for workers in sorted({parallel["num_workers"] for parallel in LAYOUTS.values()}):
        planned = [
            (layout, kind, recipe)
            for layout, parallel in LAYOUTS.items()
            if parallel["num_workers"] == workers
            for kind, recipe in make_recipes(storage, layout, parallel).items()
        ]
        for _, kind, recipe in planned:
            if kind == "continued":
                hand_over(source, recipe)
        given = run_distributed(train, workers, *(recipe for _, _, recipe in planned))[0]
        for (layout, kind, _), result in zip(planned, given, strict=True):
            results.setdefault(layout, {})[kind] = result
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_single_process_losses(
    single: dict[str, Result], layouts: dict[str, dict[str, Result]], layout: str
) -> None:
    whole, new = single["new"], layouts[layout]["new"]
    np.testing.assert_allclose(new["loss"], whole["loss"], rtol=1e-4)
    np.testing.assert_allclose(new["grad_norm"], whole["grad_norm"], rtol=1e-3)
    for step, measured in whole["held_out"].items():
        assert new["held_out"][step] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS_OF_CAUSAL[1:])
def test_layout_gives_the_single_process_losses_of_a_causal_run(
    single: dict[str, Result], layouts: dict[str, dict[str, Result]], layout: str
) -> None:
    found, expected = layouts[layout]["causal"]["loss"], single["causal"]["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS_OF_WINDOWS[1:])
def test_layout_gives_the_single_process_losses_of_a_model_with_windows(
    single: dict[str, Result], layouts: dict[str, dict[str, Result]], layout: str
) -> None:
    found, expected = layouts[layout]["windows"], single["windows"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize(("layout", "num_kinds"), [("TP 2 x SP", 2), ("PP 2 x VP 2", 1)])
def test_a_mask_is_made_once_for_all_layers_chunks_and_recomputation(
    layouts: dict[str, dict[str, Result]], layout: str, num_kinds: int
) -> None:
    """Layers are local and global in turn: the first stage of two, of chunks of a layer each, has the local ones only.

    Both layouts recompute all activations, and one passes each microbatch through two chunks.
    """
    num_microbatches = 6 * 4  # steps, and microbatches of each
    num_held_out = 3 * 4  # validations, before the first step and after steps 3 and 6
    num_masks = layouts[layout]["windows"]["num_masks"]
    assert num_masks == num_kinds * (num_microbatches + num_held_out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_continues_the_single_process_checkpoint(
    single: dict[str, Result], layouts: dict[str, dict[str, Result]], layout: str
) -> None:
    continued = layouts[layout]["continued"]["loss"]
    np.testing.assert_allclose(continued, single["new"]["loss"][3:], rtol=1e-4)


def test_single_process_continues_the_checkpoint_of_any_layout(
    storage: Path, single: dict[str, Result], layouts: dict[str, dict[str, Result]]
) -> None:
    continued = []
    for layout, parallel in LAYOUTS.items():
        continued.append(
            tiny_recipe(storage, name=f"back {layout}".replace(" ", "-"), evaluation=CAUSAL)
        )
        hand_over(make_recipes(storage, layout, parallel)["new"], continued[-1])
    (results,) = run_distributed(train, 1, *continued)
    assert len(results) == len(layouts)
    for result in results:
        np.testing.assert_allclose(result["loss"], single["new"]["loss"][3:], rtol=1e-4)


def test_resumed_run_is_the_same_run_bit_for_bit(storage: Path) -> None:
    """Steps 4 to 6 after a restart equal those without one, with a sharded optimizer and with virtual stages.

    So do those of runs that gather weights during the forward pass, before or after the restart only. No validation
    precedes the checkpoint at step 3, which would have gathered them.
    """
    late = LAYOUTS["DP 2"] | {"overlap_param_gather": True}
    interleaved = LAYOUTS["PP 2 x VP 2"]

    def make_all(name: str, *layouts: dict[str, Any]) -> list[Recipe]:
        return [
            tiny_recipe(storage, name=f"{name}-{number}", parallel=layout, validation={"every": 2})
            for number, layout in enumerate(layouts)
        ]

    whole = make_all("whole", LAYOUTS["DP 2"], late, interleaved)
    resumed = make_all("resumed", late, LAYOUTS["DP 2"], interleaved)
    first = run_distributed(train, 2, *whole)[0]
    assert first[0] == first[1]
    for source, target in zip(whole, resumed, strict=True):
        hand_over(source, target)
    second = run_distributed(train, 2, *resumed)[0]
    for before, after in zip(first, second, strict=True):
        assert after["loss"] == before["loss"][3:]
        assert after["grad_norm"] == before["grad_norm"][3:]
        assert after["held_out"] == {
            step: losses for step, losses in before["held_out"].items() if step > 3
        }


def test_buckets_have_the_size_of_the_recipe(layouts: dict[str, dict[str, Result]]) -> None:
    """The runs of the other tests show that it does not matter what they compute."""
    assert layouts["DP 2"]["new"]["num_buckets"] == 1
    assert layouts["PP 2 x VP 2 x DP 2"]["new"]["num_buckets"] > 2


def test_the_loss_falls(single: dict[str, Result]) -> None:
    """The tests above compare losses, which shows equal learning only if the losses fall."""
    assert single["new"]["loss"][-1] < single["new"]["loss"][0] - 0.5
