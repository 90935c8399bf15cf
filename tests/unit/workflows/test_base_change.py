"""Runs whose base was trained again, and those whose base is as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.config import HuggingFaceBase, Recipe, load
from ul2r.config.ladder import Ladder
from ul2r.errors import CheckpointError
from ul2r.inference import read_export_metadata
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
from ul2r.testing.models import write_tiny_export
from ul2r.train.checkpoint.layout import LATEST_FILE, checkpoint_name
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.workflows import ladder_run, scaling
from ul2r.workflows.base_change import has_other_base
from ul2r.workflows.ladder_plan import LadderRun, plan_ladder


@pytest.fixture
def runs(tmp_path: Path) -> list[LadderRun]:
    """Plan a base and its arms; the base's export is of checkpoint "first"."""
    overrides = [f"storage={tmp_path}", "seeds=[1]", "budgets=[100]"]
    runs = plan_ladder(load(Path("ladder"), overrides, Ladder))
    write_tiny_export(runs[0].recipe.paths.export, num_sentinels=16)
    export_again(runs[0].recipe, "first")
    write_checkpoint(runs[1].recipe, base_id="first")
    return runs


def export_again(recipe: Recipe, checkpoint: str) -> None:
    export = recipe.paths.export
    replace(read_export_metadata(export), checkpoint=checkpoint).write(export)


def write_checkpoint(recipe: Recipe, base_id: str, step: int = 5) -> None:
    """Write the description of a checkpoint, and nothing of its weights."""
    folder = recipe.paths.checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    (recipe.paths.checkpoints / LATEST_FILE).write_text(folder.name)
    CheckpointInfo(
        checkpoint_id="own",
        run_name=recipe.name,
        step=step,
        tokens=1,
        flops=1.0,
        base_id=base_id,
        tokenizer_digest="",
        data_fingerprint="",
        recipe={},
    ).write(folder)


def test_run_is_not_finished_with_a_base_that_was_trained_again(
    runs: list[LadderRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "_is_measured", lambda *_: True)
    monkeypatch.setattr(scaling, "_is_completed", lambda *_: True)
    base, arm = runs[:2]
    assert scaling.find_finished([base, arm]) == {base.name, arm.name}
    export_again(base.recipe, "second")
    assert scaling.find_finished([base, arm]) == {base.name}


def test_ladder_refuses_to_go_on_with_such_a_run(
    runs: list[LadderRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would resume from the run's last checkpoint, which is of the earlier base."""
    monkeypatch.setattr(ladder_run, "_train", lambda _: pytest.fail("trains it"))
    base, arm = runs[:2]
    export_again(base.recipe, "second")
    with pytest.raises(CheckpointError) as caught:
        ladder_run.complete_run(arm.recipe)
    assert str(caught.value) == (
        f"run {arm.name!r} began with weights that its base {base.name!r} no longer has, since that was trained "
        f"again: remove {arm.recipe.paths.folder} and rerun"
    )


def test_damaged_checkpoints_are_skipped_and_unknown_bases_are_no_others(
    runs: list[LadderRun],
) -> None:
    base, arm, new = runs[:3]
    second = replace(read_export_metadata(base.recipe.paths.export), checkpoint="second")
    assert has_other_base(arm.recipe, second)
    (arm.recipe.paths.checkpoints / checkpoint_name(7)).mkdir()
    (arm.recipe.paths.checkpoints / LATEST_FILE).write_text(checkpoint_name(7))
    assert has_other_base(arm.recipe, second)

    assert not has_other_base(new.recipe, second)
    # An export of another tool has no record of its checkpoint.
    assert not has_other_base(arm.recipe, replace(second, checkpoint=None))


def test_folder_of_an_export_is_no_other_base(runs: list[LadderRun]) -> None:
    """A run that continues one has recorded a digest of the folder, not the checkpoint."""
    base, arm = runs[:2]
    export = base.recipe.paths.export
    recipe = arm.recipe.model_copy(update={"base": HuggingFaceBase(hf=str(export))})
    with SafetensorsReader(export, "llama") as reader:
        write_checkpoint(recipe, base_id=reader.identity, step=9)

    assert not has_other_base(recipe, read_export_metadata(export))
