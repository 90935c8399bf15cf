"""Old keys of a recipe are refused where a person wrote them, and translated where a run saved them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from ul2r.config import Denoiser, Recipe, load
from ul2r.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES, rename_keys
from ul2r.config.strict_model import StrictModel
from ul2r.errors import RecipeError

DENOISERS: tuple[type[StrictModel], ...] = get_args(get_args(Denoiser)[0])
CHANGED_VALUES = [
    (old, value, new_value)
    for old, values in RENAMED_VALUES.items()
    for value, new_value in values.items()
]


def tree_of(dotted: str, value: object) -> dict[str, Any]:
    """Return a tree that holds `value` at a dotted key, with a list of one item for `*`."""
    tree: Any = value
    for part in reversed(dotted.split(".")):
        tree = [tree] if part == "*" else {part: tree}
    assert isinstance(tree, dict)
    return tree


def known_keys(section: type[StrictModel], prefix: str = "") -> set[str]:
    """Return every dotted key of a section and of the sections and mixtures in it."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, StrictModel):
                found |= known_keys(kind, f"{prefix}{name}.")
        if name == "mixture":
            for denoiser in DENOISERS:
                found |= {f"{prefix}{name}.*.{key}" for key in denoiser.model_fields}
    return found


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, Recipe)
    return str(caught.value)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_key_is_gone_and_new_key_exists(old: str, new: str) -> None:
    keys = known_keys(Recipe)
    assert old not in keys
    assert new in keys


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_key_in_a_file_is_refused_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(str(tree_of(old, 1)), encoding="utf-8")
    old_place, new_place = (key.replace("*", "0") for key in (old, new))
    assert refusal(path) == f"{path}: {old_place} is now {new_place}: rename it"


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_key_in_an_override_is_refused_with_the_new_one(
    tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "recipe.yaml"
    denoisers = "{mixture: [{kind: causal}]}"
    path.write_text(f"objective: {denoisers}\nevaluation: {denoisers}\n", encoding="utf-8")
    old_place, new_place = (key.replace("*", "0") for key in (old, new))
    message = f"{old_place} is now {new_place}: rename it"
    assert refusal(path, f"{old_place}=1") == f"--set {old_place}=1: {message}"


@pytest.mark.parametrize(("old", "value", "new_value"), CHANGED_VALUES)
def test_refusal_names_the_new_value_where_it_changed_too(
    tmp_path: Path, old: str, value: str, new_value: object
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(str(tree_of(old, value)), encoding="utf-8")
    shown = str(new_value).lower()
    assert refusal(path) == f"{path}: {old}={value} is now {RENAMED_KEYS[old]}={shown}: rename it"


def test_all_old_keys_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {layers: 2, heads: 2}\n", encoding="utf-8")
    assert refusal(path) == (
        f"{path}: model.layers is now model.num_layers, model.heads is now model.num_heads: rename them"
    )


def test_old_key_in_an_extended_file_is_refused_naming_that_file(tmp_path: Path) -> None:
    parent = tmp_path / "parent.yaml"
    parent.write_text("training: {microbatch_rows: 2}\n", encoding="utf-8")
    child = tmp_path / "child.yaml"
    child.write_text("extends: parent.yaml\nname: child\n", encoding="utf-8")
    assert refusal(child).startswith(f"{parent}: training.microbatch_rows is now")


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_saved_tree_is_translated(old: str, new: str) -> None:
    assert rename_keys(tree_of(old, 3)) == tree_of(new, 3)


@pytest.mark.parametrize(("old", "value", "new_value"), CHANGED_VALUES)
def test_saved_value_is_translated(old: str, value: str, new_value: object) -> None:
    assert rename_keys(tree_of(old, value)) == tree_of(RENAMED_KEYS[old], new_value)


def test_tree_without_old_keys_is_not_changed() -> None:
    tree = {
        "name": "layers",
        "base": None,
        "model": {"num_layers": 2, "rope_scaling": None},
        "objective": {"mixture": [{"kind": "causal"}]},
    }
    assert rename_keys(tree) == tree


def test_translation_leaves_its_argument_alone() -> None:
    tree = {"model": {"layers": 2}}
    rename_keys(tree)
    assert tree == {"model": {"layers": 2}}
