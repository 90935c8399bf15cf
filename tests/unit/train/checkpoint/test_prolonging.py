"""Runs whose number of steps is raised: only while no learning rate of a step taken depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.metadata import CheckpointInfo


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return make_tiny_store(tmp_path_factory.mktemp("store"), num_documents=12)


Prolonged = tuple[int, dict[str, Any], dict[str, Any]]
"""Step of the last checkpoint, optimizer of the run of 20 steps, and its changes in that of 40."""


def check_prolonged(dataset: TokenDataset, storage: Path, case: Prolonged) -> None:
    """Check the last checkpoint of a run against a recipe with more steps."""
    step, old, new = case
    before, after = (
        tiny_recipe(storage, training={"steps": steps}, optimizer=optimizer)
        for steps, optimizer in ((20, old), (40, {**old, **new}))
    )
    CheckpointInfo.from_recipe(before, dataset, step=step).check_same_run(after, dataset)


@pytest.mark.parametrize(
    "case",
    [
        (20, {"schedule": "constant", "warmup_fraction": 0}, {}),
        (20, {"schedule": "constant", "warmup_fraction": 0.1}, {"warmup_fraction": 0.05}),
        (16, {"schedule": "wsd", "warmup_fraction": 0}, {}),
        (16, {"schedule": "wsd", "warmup_fraction": 0}, {"decay_fraction": 0.1}),
        (2, {"schedule": "cosine", "warmup_fraction": 0.1}, {"warmup_fraction": 0.05}),
    ],
)
def test_steps_can_be_raised_while_no_learning_rate_of_a_step_taken_depends_on_them(
    dataset: TokenDataset, tmp_path: Path, case: Prolonged
) -> None:
    check_prolonged(dataset, tmp_path, case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            (20, {"schedule": "cosine", "warmup_fraction": 0}, {}),
            "of 20 steps, which cannot be prolonged to training.steps=40: under optimizer.schedule=cosine .* set "
            "training.steps back; or continue its weights in a run with another name and base: tiny$",
        ),
        (
            (20, {"schedule": "constant", "warmup_fraction": 0.1}, {}),
            "warmed up for 2 steps, .* it would have been 4: set optimizer.warmup_fraction=0.05;",
        ),
        (
            (17, {"schedule": "wsd", "warmup_fraction": 0}, {}),
            "has fallen since step 16: .*`latest`",
        ),
        (
            (16, {"schedule": "wsd", "warmup_fraction": 0}, {"decay_fraction": 0.7}),
            "decay_fraction=0.7 the learning rate would have fallen since step 12: lower it",
        ),
        (
            (20, {"schedule": "constant", "warmup_fraction": 0}, {"schedule": "cosine"}),
            "optimizer.schedule: constant in the checkpoint, cosine in the recipe",
        ),
        (
            (20, {"schedule": "constant", "warmup_fraction": 0}, {"weight_decay": 0.2}),
            "optimizer.weight_decay: 0.1 in the checkpoint, 0.2 in the recipe",
        ),
    ],
)
def test_steps_cannot_be_raised_otherwise(
    dataset: TokenDataset, tmp_path: Path, case: Prolonged, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_prolonged(dataset, tmp_path, case)


def test_steps_cannot_be_lowered(dataset: TokenDataset, tmp_path: Path) -> None:
    before, after = (
        tiny_recipe(tmp_path, training={"steps": steps}, optimizer={"schedule": "constant"})
        for steps in (6, 5)
    )
    info = CheckpointInfo.from_recipe(before, dataset, step=3)
    with pytest.raises(CheckpointError, match=r"training\.steps: 6 in the checkpoint, 5 in"):
        info.check_same_run(after, dataset)
