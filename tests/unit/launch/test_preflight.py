"""Checks of a recipe before its run starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError, RecipeError
from ul2r.launch.preflight import check_run, check_unprepared, copy_last_checkpoint
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token

DENOISER = {"kind": "prefix", "name": "S50%", "mode": "S2S", "weight": 1}


@pytest.mark.parametrize("section", ["objective", "evaluation"])
def test_name_that_cannot_be_recorded_is_refused_for_a_new_run_only(
    tmp_path: Path, section: str
) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    recipe = tiny_recipe(tmp_path, **{section: {"mixture": [DENOISER]}})
    message = rf"{section}\.mixture: name 'S50%'.*rename"
    with pytest.raises(RecipeError, match=message):
        check_run(recipe, dataset, None)
    with pytest.raises(RecipeError, match=message):
        check_unprepared(recipe)

    # A run that began under such a name could not end under another: its checkpoint holds the mixture.
    check_run(recipe, dataset, CheckpointInfo.from_recipe(recipe, dataset))


def test_infilling_longer_than_a_slot_is_refused_for_a_new_run_only(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    recipe = tiny_recipe(tmp_path, evaluation={"infill_context_length": 64})
    message = r"infill_context_length=64 .* makes 135 tokens, but a slot has 65: lower"
    for check in (partial(check_run, recipe, dataset, None), partial(check_unprepared, recipe)):
        with pytest.raises(RecipeError, match=message):
            check()
    # 2 x 29 + 3 + 3 sentinels + a mode are 65 tokens: an eos that closes the inputs is one too many.
    fitting = {"evaluation": {"infill_context_length": 29}}
    check_run(tiny_recipe(tmp_path, **fitting), dataset, None)
    with pytest.raises(RecipeError, match="makes 66 tokens, but a slot has 65"):
        check_run(
            tiny_recipe(tmp_path, **fitting, objective={"eos_after_inputs": True}), dataset, None
        )

    # A run that began before the check goes on: its evaluation can be changed later.
    check_run(recipe, dataset, CheckpointInfo.from_recipe(recipe, dataset))


def write_finished(recipe: Recipe, dataset: TokenDataset) -> CheckpointStore:
    """Write the last checkpoint of a run that was killed before the copy."""
    steps = recipe.training.steps
    token = acquire_writer_token(recipe.paths.checkpoints)
    store = CheckpointStore.from_recipe(recipe, writer_token=token)
    store.create_staging_dir(steps)
    CheckpointInfo.from_recipe(recipe, dataset, step=steps).write(store.staging_dir(steps))
    write_digests(store.staging_dir(steps), {})
    store.publish(steps)
    return store


def test_finished_run_does_not_copy_over_a_run_in_another_storage(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    settings = {"remote_dir": str(tmp_path / "far")}
    theirs = tiny_recipe(tmp_path / "theirs", checkpoints=settings, training={"steps": 2})
    write_finished(theirs, dataset)
    copy_last_checkpoint(theirs)
    copies = tmp_path / "far" / theirs.name
    before = {path.name for path in copies.iterdir()}
    assert "step_00000002" in before

    ours = tiny_recipe(tmp_path / "ours", checkpoints=settings, training={"steps": 4})
    write_finished(ours, dataset)
    with pytest.raises(CheckpointError, match="the copies of a run of the same name in another st"):
        copy_last_checkpoint(ours)
    assert {path.name for path in copies.iterdir()} == before
    assert (copies / "latest").read_text() == "step_00000002"


def test_finished_run_restored_from_its_copy_is_not_refused(tmp_path: Path) -> None:
    dataset = make_tiny_store(tmp_path / "store", num_documents=12)
    settings = {"remote_dir": str(tmp_path / "far")}
    recipe = tiny_recipe(tmp_path / "lost", checkpoints=settings)
    write_finished(recipe, dataset)
    copy_last_checkpoint(recipe)

    moved = tiny_recipe(tmp_path / "moved", checkpoints=settings)
    restored = CheckpointStore.from_recipe(moved).restore()
    assert restored is not None
    copy_last_checkpoint(moved)
    token = (moved.paths.checkpoints / "owner").read_text()
    assert (tmp_path / "far" / moved.name / "owner").read_text() == token
