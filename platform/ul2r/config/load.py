"""Reading a recipe: YAML, `extends` and dotted overrides; every mistake is one line that names its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ul2r.config.layers import Layer, find_source, merge, nest_dotted_keys
from ul2r.config.named_recipes import SUFFIX, find_recipe, is_named_recipe, suggest_recipe
from ul2r.config.parse_yaml import check_values, one_line, parse_yaml
from ul2r.config.renamed_keys import describe_renamed_keys
from ul2r.config.strict_model import StrictModel
from ul2r.config.validation_errors import explain, find_mistake
from ul2r.errors import RecipeError
from ul2r.filesystem import suggest_path

SectionType = TypeVar("SectionType", bound=StrictModel)


def load(
    path: Path,
    overrides: Sequence[str],
    kind: type[SectionType],
    complete: Callable[[dict[str, Any]], None] | None = None,
    layers: Sequence[Layer] = (),
) -> SectionType:
    """Read `path`, apply `overrides` such as "training.steps=10", and validate as `kind`.

    A file may begin with `extends: other.yaml`, a path relative to its own, or the name of a recipe that comes with the
    package. Its keys are then laid over that file's:
    groups are merged key by key, lists and values are replaced, and `key: null` removes an inherited key with all that
    is in it, so that its default counts.

    Args:
        path: The YAML file, or the name of a recipe that comes with the package.
        overrides: Each "dotted.key=value", the value in YAML; an item of a list is named by its number from 0.
        kind: Type of the result, `Recipe` or `Comparison`.
        complete: Adds settings from other files to the tree before it is validated.
        layers: Settings laid over the file's as over those of a file that is extended, each over those before.

    Raises:
        RecipeError: If the file cannot be read or a key, type or value is wrong; one line.
    """
    # The order in which later settings win: extended files, the file itself, layers, --set, and for what is still
    # missing `complete`.
    path = find_recipe(path, Path())
    tree = _read(path, ())
    for layer in layers:
        check_values(layer.tree, layer.source)
        _refuse_renamed_keys(layer.tree, layer.source)
        # A copy, since what follows changes the tree in place.
        tree = merge(tree, deepcopy(layer.tree))
    # Checked after each override, so that the message names the one that has the old key.
    for override in overrides:
        _apply_override(tree, override)
        # Also a dotted key can be nested too deeply.
        check_values(tree, f"--set {override}")
        _refuse_renamed_keys(tree, f"--set {override}")
        _nest_sizes(tree)
    _refuse_other_kind(path, tree, kind)
    _refuse_shared_settings(path, tree)
    if complete is not None:
        complete(tree)

    try:
        # The context is for fields that hold paths relative to this file, and for messages about what it holds.
        return kind.model_validate(tree, context={"folder": path.parent, "file": path})
    except ValidationError as error:
        # "from None": pydantic's own report of many lines would only repeat this one.
        source = find_source(path, layers, find_mistake(error)["loc"])
        raise RecipeError(one_line(f"{source}: {explain(error, kind)}")) from None


def _refuse_other_kind(path: Path, tree: dict[str, Any], kind: type[StrictModel]) -> None:
    """Refuse a file of another kind with one line that names its verb, instead of a list of wrong keys."""
    fields = kind.model_fields
    if "recipes" in tree and "recipes" not in fields:
        raise RecipeError(f"{path} is a comparison: give it to `ul2r compare`, or name one run")
    if "arms" in tree and "arms" not in fields:
        raise RecipeError(f"{path} is a ladder: give it to `ul2r scaling`, or name one run")
    if "objective" in tree and "objective" not in fields:
        verb, key = ("compare", "recipes") if "recipes" in fields else ("scaling", "arms")
        raise RecipeError(
            f"{path} is the recipe of a run: `ul2r {verb}` takes a file that lists several under `{key}`"
        )


def _refuse_shared_settings(path: Path, tree: dict[str, Any]) -> None:
    """Refuse a file without a name that others in its folder extend, which would be a list of missing keys."""
    if "name" in tree:
        return
    runs = [
        other.stem if is_named_recipe(other) else str(other)
        for other in sorted(path.parent.glob(f"*{SUFFIX}"))
        if _find_parent_of_run(other) in {path.name, path.stem}
    ]
    if runs:
        raise RecipeError(
            f"{path} holds settings that runs share and is none itself: name one of {', '.join(runs)}"
        )


def _find_parent_of_run(path: Path) -> object:
    """Return what a file with a name extends; None if it extends nothing, or is no recipe of a run."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, RecipeError):
        return None
    return tree.get("extends") if isinstance(tree, dict) and "name" in tree else None


def dump(section: StrictModel) -> str:
    """Return the section as YAML that `load` reads back."""
    # mode="json" turns paths into strings and tuples into lists, which safe_dump would refuse; keys stay in the order
    # of their definition.
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Return the file's tree, laid over that of the file it extends.

    Args:
        path: The file.
        extended_by: The files that lead to it by `extends`, the first one first.
    """
    # Resolved, since the same file may be reached by different relative paths. Unlike `Path.resolve`, which raises a
    # RuntimeError before Python 3.13, it leaves a link to itself to `read_text`.
    if os.path.realpath(path) in map(os.path.realpath, extended_by):
        chain = " -> ".join(map(str, (*extended_by, path)))
        raise RecipeError(f"{path}: extends itself: {chain}")

    suffix = f" (extended by {extended_by[-1]})" if extended_by else ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # An OSError has a reason of the system's; a UnicodeDecodeError has none.
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        is_missing = isinstance(error, FileNotFoundError)
        hint = (suggest_recipe(path) or suggest_path(path)) if is_missing else ""
        raise RecipeError(f"{path}: recipe cannot be read: {reason}{suffix}{hint}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise RecipeError(f"{path}: a recipe should be a group of keys, the file is empty{suffix}")
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe should be a group of keys, got {type(tree).__name__}{suffix}"
        )
    # For each file of the chain, so that the message names the file to edit.
    _refuse_renamed_keys(tree, str(path))
    _nest_sizes(tree)

    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: input should be a file name, got {parent!r}")
    return merge(_read(find_recipe(Path(parent), path.parent), (*extended_by, path)), tree)


def _refuse_renamed_keys(tree: dict[str, Any], where: str) -> None:
    if renamed := describe_renamed_keys(tree):
        raise RecipeError(one_line(f"{where}: {renamed}"))


def _nest_sizes(tree: dict[str, Any]) -> None:
    """Nest the dotted keys of a ladder's sizes in place: the dots of `--set` nest as well, and both must meet."""
    sizes = tree.get("sizes")
    if isinstance(sizes, dict):
        tree["sizes"] = {
            name: nest_dotted_keys(settings) if isinstance(settings, dict) else settings
            for name, settings in sizes.items()
        }


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(one_line(f"--set {override}: write it as key.key=value"))
    if keys == ["extends"]:
        raise RecipeError(one_line(f"--set {override}: extends can only be set in a file"))
    # YAML, so that "--set training.steps=10" is a number and "--set data.corpus=[a, b]" a list.
    value = parse_yaml(text, f"--set {override}")

    # Walks down to the last key but one and creates groups that the file leaves out. Unknown keys are created as well:
    # validation refuses them, with a suggestion.
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        index = _index_of(node, key, override)
        # A group without keys is None in YAML.
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
        if not isinstance(node, dict | list):
            reached = ".".join(keys[: depth + 1])
            raise RecipeError(f"--set {override}: {reached} is {node!r}, not a group of keys")
    node[_index_of(node, keys[-1], override)] = value


def _index_of(node: dict[str, Any] | list[Any], key: str, override: str) -> int | str:
    """Return the key itself, or its number if `node` is a list."""
    if isinstance(node, dict):
        return key
    # Nothing has a billion items, and Python converts no more than 4,300 digits.
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise RecipeError(
            f"--set {override}: {key!r} is not an item of a list of {len(node)}, numbered from 0"
        )
    return int(key)
