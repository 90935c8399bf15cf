"""Metrics, progress notes and traces of a run of two ranks, which believe that they are on two nodes."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

Records = list[tuple[int, dict[str, float]]]
EVERY = 2


def train(recipe: Recipe) -> tuple[Records, list[str], list[Path]]:
    """Train on this rank, on a node with a name of its own; return records, progress notes and artifacts."""
    import torch.distributed as dist

    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.callbacks import Callback
    from ul2r.train.monitor.progress import describe_progress
    from ul2r.train.state import TrainState

    class NoteRecorder(Callback):
        def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
            assert state.step == len(notes) + 1
            notes.append(describe_progress(metrics))

    pytest.MonkeyPatch().setattr(socket, "gethostname", lambda: f"node-{dist.get_rank()}")
    tracker, notes = MemoryTracker(), list[str]()
    run_worker(recipe, tracker, callbacks=[NoteRecorder()])
    return tracker.records, notes, tracker.artifacts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("metrics")
    make_tiny_store(folder / "store")
    return tiny_recipe(
        folder,
        parallel={"num_workers": 2},
        training={"log_every": EVERY},
        profile={"steps": [3]},
        launch={"device_peak_tflops": 0.01},
    )


@pytest.fixture(scope="module")
def seen(recipe: Recipe) -> list[tuple[Records, list[str], list[Path]]]:
    return run_distributed(train, 2, recipe)


def test_rates_agree_with_the_batches(
    recipe: Recipe, seen: list[tuple[Records, list[str], list[Path]]]
) -> None:
    """Ratios of rates do not depend on time: source tokens and FLOPs per row position, MFU per TFLOP."""
    dataset = open_dataset(recipe.storage_paths.store)
    batches, positions = BatchBuilder(recipe, dataset), 8 * 64
    special = [dataset.vocabulary.eos, *dataset.vocabulary.non_text_ids]
    petaflops = 0.0
    (records, _, _), _ = seen
    rated = [(step, metrics) for step, metrics in records if "train/mfu" in metrics]
    assert [step for step, _ in rated] == [2, 3, 4, 6]
    before = 0
    for step, metrics in rated:
        read = [batches.build(number) for number in range(before, step)]
        text = sum(
            int(np.isin(rows.tokens[rows.denoiser_ids >= 0], special, invert=True).sum())
            for rows in read
        )
        taken = (step - before) * positions
        rate = metrics["train/tokens_per_second"]
        assert metrics["train/source_tokens_per_second"] / rate == pytest.approx(text / taken)
        flops = (metrics["progress/petaflops"] - petaflops) * 1e15
        assert metrics["train/tflops_per_device"] * 2e12 / rate == pytest.approx(flops / taken)
        assert metrics["train/mfu"] == pytest.approx(metrics["train/tflops_per_device"] / 0.01)
        assert 0 <= metrics["train/data_wait_fraction"] <= 1
        before, petaflops = step, metrics["progress/petaflops"]


def test_memory_and_load_over_all_nodes_are_logged_by_rank_0(
    seen: list[tuple[Records, list[str], list[Path]]],
) -> None:
    (records, _, _), (others, _, _) = seen
    metrics = next(values for _, values in reversed(records) if "train/memory_gib" in values)
    assert 0.05 < metrics["train/memory_gib"] < 20
    system = {name: value for name, value in metrics.items() if name.startswith("system/")}
    loads = ("cpu_utilization_percentage", "memory_used_gib")
    assert set(system) == {f"system/{n}/{kind}" for n in loads for kind in ("min", "mean", "max")}
    for name in loads:
        least, mean, most = (system[f"system/{name}/{kind}"] for kind in ("min", "mean", "max"))
        assert 0 <= least <= mean <= most
    assert others == [], "rank 0 logs for all"


def test_progress_notes_hold_loss_and_mfu(
    seen: list[tuple[Records, list[str], list[Path]]],
) -> None:
    (_, notes, _), (_, notes_of_others, _) = seen
    assert len(notes) == 6
    assert notes[0].startswith("loss ")
    assert "MFU" not in notes[0], "not known before metrics are logged"
    assert "MFU" in notes[-1]
    assert "skipped" not in notes[-1]
    assert notes_of_others == [], "only rank 0 shows progress"


def test_trace_of_a_chosen_step_is_an_artifact(
    recipe: Recipe, seen: list[tuple[Records, list[str], list[Path]]]
) -> None:
    trace = recipe.paths.profiles / "step_00000003.json.gz"
    assert [kept for _, _, kept in seen] == [[trace], []]
    with gzip.open(trace, "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert "step 3" in names
    assert {"aten::mm", "gloo:all_reduce", "Optimizer.step#AdamW.step"} <= names
