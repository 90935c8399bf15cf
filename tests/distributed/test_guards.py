"""Bad steps on real ranks: skipped, rewound or stopped at, and the same again after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from ul2r.config import Recipe, Training
from ul2r.data.sampling.order import DataOrder
from ul2r.errors import DivergedError
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {"num_workers": 2, "overlap_param_gather": True},
    "PP 2": {"num_workers": 2, "pipeline": 2},
}
STEPS, SAVED_EVERY, WINDOW = 16, 4, 8
NOT_A_NUMBER, DAMAGE, KILL = 5, 15, 18
"""BatchBuilder at which activations become NaN, the weights are damaged, and every rank is killed."""
GOOD = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 16, 17, 18, 19]
"""BatchBuilder that are left, without the one of NaN and without those between the last checkpoint and the damage."""


@dataclass(frozen=True)
class Faults:
    """Faults of this machine: batches of NaN, the one that damages the weights, the one at which ranks are killed, and
    the one of which rank 1 alone reads NaN as gradient norm."""

    nan: tuple[int, ...] = ()
    damage: int = -1
    kill: int = -1
    disagree: int = -1


@dataclass(frozen=True)
class Result:
    """Record of a rank: last loss and number of skipped batches by step, batches read, artifacts, error message."""

    loss: dict[int, float]
    skipped: dict[int, float]
    read: list[int]
    artifacts: list[Path]
    error: str


def train(recipe: Recipe, faults: Faults, order: list[int] | None = None) -> Result:
    """Train on this rank, on the batches of `order` in place of 0, 1, 2, ..."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import StepResult, TrainStep

    numbers_read: list[int] = []
    samples_per_batch = recipe.training.global_batch_size * recipe.objective.slots_per_row

    class FaultyStep(TrainStep):
        """The real step on a faulty machine."""

        def forward_backward(self, step: int, batch: Batch) -> StepResult:
            number = int(batch.sample_ids.max()) // samples_per_batch
            if number == faults.damage:
                for parameter in self.chunks[0].parameters():
                    parameter.data.mul_(10)
            factor = math.nan if number in faults.nan else 1.0
            hook = (
                self.chunks[0]
                .decoder.layers[0]
                .register_forward_hook(lambda _, __, output: (output[0] * factor, *output[1:]))
            )
            try:
                result = super().forward_backward(step, batch)
            finally:
                hook.remove()
            is_faulty = number == faults.disagree and self.mesh.rank == 1
            return replace(result, gradient_norm=math.nan) if is_faulty else result

    def read(mesh: Mesh, batches: range, data_order: DataOrder) -> Iterator[Batch]:
        builder = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store), data_order)
        for batch in batches:
            if batch == faults.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            numbers_read.append(order[batch] if order else batch)
            yield builder.build(numbers_read[-1], mesh.data_rank, recipe.parallel.data)

    pytest.MonkeyPatch().setattr("ul2r.train.loop.TrainStep", FaultyStep)
    tracker, error = MemoryTracker(), ""
    try:
        run_worker(recipe, tracker, read)
    except DivergedError as diverged:
        error = str(diverged)
    loss, skipped = (dict(tracker.series(f"train/{name}")) for name in ("loss", "skipped_batches"))
    return Result(loss, skipped, numbers_read, tracker.artifacts, error)


def train_several(*runs: tuple[Recipe, Faults, list[int] | None]) -> list[Result]:
    """Train several runs in turn; only the last may diverge."""
    return [train(*run) for run in runs]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    make_tiny_store(folder / "store")
    return folder


def recipe_of(storage: Path, layout: str, name: str, **guards: int) -> Recipe:
    return tiny_recipe(
        storage,
        name=f"{name} {layout}".replace(" ", "-"),
        parallel=LAYOUTS[layout],
        training={"steps": STEPS},
        checkpoints={"every": SAVED_EVERY},
        guards={"window": WINDOW, **guards},
    )


def without_overlap(recipe: Recipe) -> Recipe:
    """Return the run with weights that are gathered at the end of each step: that a step was left out shows nowhere."""
    parallel = recipe.parallel.model_copy(update={"overlap_param_gather": False})
    return recipe.model_copy(update={"parallel": parallel})


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runs(storage: Path, layout: str) -> list[Result]:
    """Rank 0 of a run with faults, of one that reads the good batches only, and of one that exceeds its budget."""
    faults = Faults(nan=(NOT_A_NUMBER,), damage=DAMAGE)
    seen: list[list[Result]] = run_distributed(
        train_several,
        2,
        (recipe_of(storage, layout, "faulty"), faults, None),
        (without_overlap(recipe_of(storage, layout, "good")), Faults(), GOOD),
        (recipe_of(storage, layout, "helpless", max_skips=2), Faults(nan=tuple(range(3, 9))), None),
    )
    return seen[0]


def test_finding_of_one_rank_counts_on_all(storage: Path) -> None:
    """They skip the batch together; ranks of which one skips and one does not would wait for each other."""
    recipe = recipe_of(storage, "DP 2", "disagreeing").model_copy(
        update={"training": Training(steps=4, global_batch_size=8, micro_batch_size=2, log_every=1)}
    )
    results: list[Result] = run_distributed(train, 2, recipe, Faults(disagree=1))
    assert [result.read for result in results] == 2 * [[0, 1, 2, 3, 4]]
    (file,) = results[0].artifacts
    assert json.loads(file.read_text())["guard"] == "non_finite"
    assert results[0].skipped[4] == 1


def test_skipped_and_rewound_batches_leave_no_trace_in_the_weights(runs: list[Result]) -> None:
    """The losses equal those of a run that never saw these batches, bit for bit."""
    faulty, good, _ = runs
    assert faulty.read == list(range(20))
    assert list(faulty.loss) == list(range(1, STEPS + 1))
    assert faulty.loss == good.loss
    assert [faulty.skipped[step] for step in (5, 6, 12, 13, 16)] == [0, 1, 1, 4, 4]
    assert good.skipped[STEPS] == 0


def test_each_anomaly_leaves_a_report(storage: Path, layout: str, runs: list[Result]) -> None:
    folder = storage / "runs" / f"faulty {layout}".replace(" ", "-") / "guards"
    files = [
        folder / "step_00000006_batch_00000005.json",
        folder / "step_00000015_batch_00000015.json",
    ]
    assert runs[0].artifacts == files
    nan, damaged = (json.loads(file.read_text()) for file in files)
    assert (nan["guard"], nan["decision"], nan["loss"]) == ("non_finite", "skip", "nan")
    assert (damaged["guard"], damaged["decision"]) == ("loss_spike", "rewind")
    assert damaged["window"]["deviations"] > 10
    assert damaged["loss"] > 1.1 * damaged["window"]["expected"]
    assert damaged["skipped_before"] == [[5, 6]]
    assert (damaged["rows"], damaged["samples"]) == ([120, 127], [120, 127])
    assert set(damaged["loss_by_denoiser"]) <= {"S", "R", "X-long", "X-dense"}
    layers = {f"layers.{number}" for number in range(4)}
    others = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    assert set(damaged["layers"]) == layers | others
    whole = math.hypot(*(norms["gradient"] for norms in damaged["layers"].values()))
    assert whole == pytest.approx(damaged["gradient_norm"], rel=1e-5)
    assert nan["layers"]["layers.0"]["weight"] == pytest.approx(
        damaged["layers"]["layers.0"]["weight"] / 10, rel=0.2
    )


def test_spent_budget_stops_the_run_with_a_report(runs: list[Result]) -> None:
    helpless = runs[2]
    assert list(helpless.loss) == [1, 2, 3]
    assert helpless.read == [0, 1, 2, 3, 4, 5]
    assert "\n" not in helpless.error
    assert "step 4, batch 5: loss nan and gradient norm nan" in helpless.error
    assert "with 2 of guards.max_skips=2 used within 8 batches" in helpless.error
    decisions = [json.loads(file.read_text())["decision"] for file in helpless.artifacts]
    assert decisions == ["skip", "skip", "stop"]


def test_run_killed_after_a_rewind_repeats_itself(
    storage: Path, layout: str, runs: list[Result]
) -> None:
    """It resumes from the checkpoint before the damage, meets it again, and decides the same."""
    recipe = recipe_of(storage, layout, "killed")
    faults = Faults(nan=(NOT_A_NUMBER,), damage=DAMAGE, kill=KILL)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_distributed(train, 2, recipe, faults)
    faults = Faults(nan=(NOT_A_NUMBER,), damage=DAMAGE)
    resumed: Result = run_distributed(train, 2, recipe, faults)[0]
    assert resumed.read == list(range(13, 20))
    assert resumed.loss == {step: runs[0].loss[step] for step in range(13, STEPS + 1)}
