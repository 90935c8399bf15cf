"""Length of the infilling example by the slots of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import Recipe, dump
from ul2r.config.evaluation import check_infill_length, infill_example_length
from ul2r.config.load import load
from ul2r.errors import RecipeError
from ul2r.testing.recipes import tiny_recipe


def make_recipe(sequence_length: int, evaluation: dict[str, int], slots: int = 1) -> Recipe:
    tree = tiny_recipe(Path("runs")).model_dump()
    tree["objective"] |= {"sequence_length": sequence_length, "slots_per_row": slots}
    tree["evaluation"] = evaluation
    tree["data"] |= {"vocabulary_size": 4096, "num_sentinels": 512}
    return Recipe.model_validate(tree)


@pytest.mark.parametrize(("length", "slots"), [(4096, 1), (134, 1), (536, 4)])
def test_default_context_stays_where_its_example_fits(length: int, slots: int) -> None:
    """2 x 64 + 3 tokens of the text, 3 sentinels and a mode fill a slot of 134 positions."""
    assert make_recipe(length, {}, slots).evaluation.infill_context_length == 64


@pytest.mark.parametrize(("length", "slots"), [(133, 1), (64, 1), (128, 4), (32, 2)])
def test_default_context_of_short_slots_fits_any_modes(length: int, slots: int) -> None:
    recipe = make_recipe(length, {}, slots)
    evaluation = recipe.evaluation
    # "[S2S]" as text has at most 5 tokens, and an eos may close the inputs.
    check_infill_length(evaluation, recipe.objective, 6)
    assert infill_example_length(evaluation, 6) > length // slots + 1 - 6


def test_given_context_is_kept_and_refused_where_it_does_not_fit() -> None:
    recipe = make_recipe(64, {"infill_context_length": 64})
    assert recipe.evaluation.infill_context_length == 64
    with pytest.raises(
        RecipeError,
        match=r"^evaluation\.infill_context_length=64 on both sides of infill_span_length=3 makes 135 tokens, but a "
        r"slot has 65: lower one of them$",
    ):
        check_infill_length(recipe.evaluation, recipe.objective, 1)
    fitting = make_recipe(64, {"infill_context_length": 29})
    check_infill_length(fitting.evaluation, fitting.objective, 1)
    with pytest.raises(RecipeError, match="makes 66 tokens, but a slot has 65"):
        check_infill_length(fitting.evaluation, fitting.objective, 2)


def test_span_longer_than_a_slot_is_refused() -> None:
    recipe = make_recipe(64, {"infill_span_length": 70})
    with pytest.raises(RecipeError, match=r"infill_context_length=1 on both sides of infill_span_"):
        check_infill_length(recipe.evaluation, recipe.objective, 1)


def test_written_recipe_keeps_the_context(tmp_path: Path) -> None:
    recipe = make_recipe(64, {})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path, (), Recipe) == recipe
