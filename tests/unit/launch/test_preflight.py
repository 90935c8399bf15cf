"""Checks of a recipe before its run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.errors import RecipeError
from ul2r.launch.preflight import check_run, check_unprepared
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.metadata import CheckpointInfo

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
