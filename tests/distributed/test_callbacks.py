"""Callbacks of a real train loop: which hooks are called, in which order, on which ranks, and what they can request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.callbacks import Callback, LoopAction, Phase
from ul2r.train.checkpoint.storage import CheckpointStore, latest_valid
from ul2r.train.state import TrainState

pytestmark = pytest.mark.distributed


class Recorder(Callback):
    """Records the hooks that are called, and requests an action after one step.

    Args:
        rank: This rank.
        action_step: Step after which rank 1 requests the action.
        action: The action.
    """

    def __init__(self, rank: int, action_step: int, action: LoopAction) -> None:
        self.calls: list[str] = []
        self.metrics: dict[str, float] = {}
        self._rank = rank
        self._step = 0
        self._action_step = action_step
        self._action = action

    def on_phase(self, step: int, phase: str) -> None:
        self.calls.append(f"{phase} {step}")

    def on_step_begin(self, step: int) -> None:
        self.calls.append(f"begin {step}")

    def on_step_end(self, step: int, *_: object) -> None:
        self._step = step
        self.calls.append(f"end {step}")

    def on_progress(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        assert metrics["train/loss"] > 0
        self.calls.append(f"progress {state.step}")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics |= metrics
        if "train/loss" in metrics:
            self.calls.append(f"metrics {step}")

    def rank_report(self) -> int:
        self.calls.append("report")
        return 10 + self._rank

    def reduce_reports(self, reports: Sequence[int]) -> Mapping[str, float]:
        return {"test/reports": float(sum(reports))}

    def requested_action(self) -> LoopAction:
        self.calls.append("action?")
        requests = self._rank == 1 and self._step == self._action_step
        return self._action if requests else LoopAction.CONTINUE

    def close(self) -> None:
        self.calls.append("close")


def train(
    recipe: Recipe, action_step: int, action: LoopAction
) -> tuple[int, list[str], dict[str, float]]:
    """Train on this rank; return the last step, the calls of hooks and the metrics."""
    import torch.distributed as dist

    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    recorder = Recorder(dist.get_rank(), action_step, action)
    # Lists may differ between ranks: rank 0 has one more.
    callbacks = [Callback(), recorder] if dist.get_rank() == 0 else [recorder]
    state = run_worker(recipe, MemoryTracker(), callbacks=callbacks)
    return state.step, recorder.calls, recorder.metrics


def recipe_in(folder: Path) -> Recipe:
    make_tiny_store(folder / "store")
    return tiny_recipe(
        folder,
        parallel={"num_workers": 2},
        training={"steps": 5, "log_every": 2},
        validation={"every": 5},
        checkpoints={"every": 5},
    )


def saved_step(recipe: Recipe) -> str:
    path = latest_valid(CheckpointStore.from_recipe(recipe))
    assert path is not None
    return path.name


def test_hooks_are_called_in_order_and_a_requested_stop_saves_and_ends(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    results: list[Any] = run_distributed(train, 2, recipe, 2, LoopAction.STOP)
    (step, calls, metrics), (other_step, other_calls, other_metrics) = results

    def step_calls(number: int, *after: str) -> list[str]:
        phases = [f"{Phase.WAIT_FOR_DATA} {number}", f"{Phase.BROADCAST_BATCH} {number}"]
        return [*phases, f"{Phase.TRAIN} {number}", f"begin {number}", f"end {number}", *after]

    assert calls == [
        f"{Phase.LOAD} 0",
        f"{Phase.VALIDATE} 0",
        *step_calls(1, "progress 1", "action?"),
        *step_calls(2, "progress 2", "report", "metrics 2", "action?"),
        f"{Phase.SAVE} 2",
        "close",
    ]
    rank0_only = ("progress", "metrics")
    assert other_calls == [call for call in calls if not call.startswith(rank0_only)]
    assert (step, other_step) == (2, 2), "the request of rank 1 counts on every rank"
    assert saved_step(recipe) == "step_00000002"
    assert metrics["test/reports"] == 10 + 11
    assert metrics["checkpoint/save_seconds"] > 0, "metrics of checkpoints come along"
    assert other_metrics == {}


def test_requested_save_saves_and_goes_on(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    results: list[Any] = run_distributed(train, 2, recipe, 3, LoopAction.SAVE)
    step, calls, _ = results[0]
    assert step == 5
    assert [call for call in calls if call.startswith(Phase.SAVE)] == ["save 3", "save 5"]
    assert saved_step(recipe) == "step_00000005"
