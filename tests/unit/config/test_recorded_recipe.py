"""The recipe that a run was trained with, kept in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.config.recorded_recipe import read_recorded_recipe, record_recipe
from ul2r.testing.recipes import tiny_recipe


def start_training(recipe: Recipe) -> None:
    recipe.paths.folder.mkdir(parents=True, exist_ok=True)
    record_recipe(recipe)


def test_the_last_start_counts(tmp_path: Path) -> None:
    edited = tiny_recipe(tmp_path, seed=7)
    assert read_recorded_recipe(edited) is edited, "no start yet"
    for seed in (1, 2):
        start_training(tiny_recipe(tmp_path, seed=seed))
        assert read_recorded_recipe(edited) == tiny_recipe(tmp_path, seed=seed)


def test_another_precision_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tiny_recipe(tmp_path, training={"precision": "bf16"})
    for _ in range(2):
        start_training(first)
    assert caplog.messages == []
    start_training(tiny_recipe(tmp_path))
    assert caplog.messages == [
        "tiny was trained in bf16 until here and goes on in fp32: set training.precision=bf16 to continue it as it "
        "began"
    ]


def test_a_record_that_cannot_be_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(tmp_path)
    start_training(recipe)
    recipe.paths.recorded_recipe.write_text("training: {stepz: 3}\n")
    assert read_recorded_recipe(recipe) is recipe
    (message,) = caplog.messages
    assert message.startswith("the recipe as it is now counts for what was trained: ")
    assert "stepz" in message
