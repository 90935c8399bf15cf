"""Recipes that come with the package: found by name from the command line, in `extends` and in comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import Comparison, Recipe, load, named_recipes
from ul2r.config.named_recipes import list_named_recipes
from ul2r.errors import RecipeError

SHIPPED = Path(__file__).parents[3] / "jobs/recipes"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed from a wheel: in a folder without jobs/recipes."""
    monkeypatch.chdir(tmp_path)


def test_every_recipe_of_the_checkout_has_its_name() -> None:
    assert list_named_recipes() == {path.stem: path for path in SHIPPED.glob("*.yaml")}


def test_a_wheel_has_them_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").touch()
    monkeypatch.setattr(named_recipes, "FOLDERS", (tmp_path / "recipes", SHIPPED))
    assert list_named_recipes() == {"mine": tmp_path / "recipes/mine.yaml"}
    monkeypatch.setattr(named_recipes, "FOLDERS", (tmp_path / "missing",))
    assert list_named_recipes() == {}


def test_a_name_is_loaded_as_its_file_is() -> None:
    assert load(Path("demo-base"), (), Recipe) == load(SHIPPED / "demo-base.yaml", (), Recipe)
    comparison = load(Path("demo-compare"), (), Comparison)
    assert comparison.recipes["ul2r"] == SHIPPED / "demo-ul2r.yaml"


def test_own_recipes_extend_and_compare_them_by_name() -> None:
    Path("mine.yaml").write_text("extends: demo-ul2r\nname: mine\ntraining: {steps: 7}\n")
    recipe = load(Path("mine.yaml"), (), Recipe)
    shipped = load(Path("demo-ul2r"), (), Recipe)
    assert (recipe.name, recipe.training.steps) == ("mine", 7)
    assert recipe.objective == shipped.objective

    tree = "name: c\nstorage: runs/demo\nrecipes: {base: demo-base, ul2r: mine.yaml}\n"
    Path("compare.yaml").write_text(tree)
    recipes = load(Path("compare.yaml"), (), Comparison).recipes
    assert recipes == {"base": SHIPPED / "demo-base.yaml", "ul2r": Path("mine.yaml")}


@pytest.mark.parametrize("file", ["demo-base", "demo-base.yaml"])
def test_a_file_that_is_there_is_meant_first(file: str) -> None:
    Path(file).write_text("extends: demo-control\nname: own\n")
    assert load(Path("demo-base"), (), Recipe).name == "own"
    Path("mine.yaml").write_text("extends: demo-base\n")
    assert load(Path("mine.yaml"), (), Recipe).name == "own"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("demo-bse", "; did you mean demo-base or "),
        ("folder/demo-bse", "; did you mean demo-base or "),
        ("demo-base.yaml", "; the recipe that comes with ul2r is called demo-base, without "),
        ("jobs/recipes/demo-base.yaml", "called demo-base, without folder and .yaml"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(Path(name), (), Recipe)
    message = str(refused.value)
    assert message.startswith(f"{name}: recipe cannot be read: No such file or directory")
    assert hint in message
    assert "\n" not in message


def test_a_name_that_is_near_none_has_no_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"No such file or directory$"):
        load(Path("xyzzy"), (), Recipe)


def test_a_wrong_file_name_is_answered_with_the_nearest_file() -> None:
    Path("mine.yaml").write_text("extends: demo-base\nname: own\n")
    with pytest.raises(RecipeError, match=r"mien\.yaml: recipe .*; did you mean \S+/mine\.yaml\?$"):
        load(Path("mien.yaml"), (), Recipe)


def test_settings_that_runs_share_are_no_run() -> None:
    runs = "name one of demo-base, demo-ul2r$"
    with pytest.raises(
        RecipeError, match=f"holds settings that runs share and is none itself: {runs}"
    ):
        load(Path("demo"), (), Recipe)
    Path("settings.yaml").write_text("extends: demo-base\nname: null\n")
    Path("a.yaml").write_text("extends: settings.yaml\nname: a\n")
    with pytest.raises(
        RecipeError, match=r"settings\.yaml holds settings .*: name one of a\.yaml$"
    ):
        load(Path("settings.yaml"), (), Recipe)
    assert load(Path("settings.yaml"), ["name=a"], Recipe).name == "a"


def test_a_run_without_a_name_that_nothing_extends_misses_it() -> None:
    Path("a.yaml").write_text("extends: demo\n")
    with pytest.raises(RecipeError, match=r"a\.yaml: .*name"):
        load(Path("a.yaml"), (), Recipe)
