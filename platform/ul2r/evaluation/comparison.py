"""Arms of a comparison, and the check that their recipes can be compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ul2r.config import HuggingFaceBase, Recipe
from ul2r.errors import RecipeError
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import evaluation_settings
from ul2r.inference import ExportMetadata

logger = logging.getLogger(__name__)

Role = str
"""Name of a column: one of `ROLES`, or any other."""
ROLES: tuple[Role, ...] = ("base", "control", "fim", "ul2r")
"""First columns of the table, from left to right."""


@dataclass(frozen=True)
class Arm:
    """One run of a comparison, or a pretrained model.

    Attributes:
        role: Its part in the comparison, and the name of its column.
        metadata: Description of its export; tokens and FLOPs include the base's.
        scores: Its held-out scores.
        origin: Name of the base that it comes from: its column, or that of a run that is no column. A base's own is
            its column.
        has_other_base: True if it began with other weights than those that the column of its base is of.
    """

    role: Role
    metadata: ExportMetadata
    scores: Scores
    origin: str = "base"
    has_other_base: bool = False


def check_comparable(
    recipes: Mapping[Role, Recipe], pretrained: Mapping[Role, HuggingFaceBase] | None = None
) -> None:
    """Check that all recipes are evaluated on the same text and continue the same base.

    Args:
        recipes: Runs by column.
        pretrained: Models that are measured as they are.

    Raises:
        RecipeError: If they are not; it names the first field that differs and both values.
    """
    models = pretrained or {}
    if len(recipes) + len(models) < 2:
        raise RecipeError(
            f"recipes: {len(recipes) + len(models)} given, but a comparison needs at least two of {', '.join(ROLES)} "
            "and other names"
        )
    if not recipes:
        raise RecipeError(
            "recipes: none of them is a recipe, from which a comparison has its text and settings: add a run"
        )

    for role, recipe in recipes.items():
        # A recipe without a role may be listed under any, and any under a name that is no role.
        if role in ROLES and recipe.role not in (None, role):
            raise RecipeError(
                f"recipes.{role}: recipe {recipe.name!r} has role={recipe.role}: list it under that role, or under a "
                f"name other than {', '.join(ROLES)}"
            )
    _check_names(recipes)
    _check_bases(recipes, models.get("base"))

    # Neighbors suffice, since equality is transitive.
    for (role, recipe), (other_role, other) in pairwise(recipes.items()):
        _check_same_settings(role, recipe, other_role, other)


def warn_of_precisions(trained: Mapping[Role, Recipe]) -> None:
    """Warn if arms were trained in different precisions; the base may come from anywhere.

    Args:
        trained: The recipe that each run was trained with.
    """
    arms = {role: recipe.precision for role, recipe in trained.items() if role != "base"}
    if len(set(arms.values())) > 1:
        logger.warning(
            "the arms were trained in different precisions, which may be what makes them differ: %s",
            ", ".join(f"{role} {precision}" for role, precision in arms.items()),
        )


def find_origins(
    recipes: Mapping[Role, Recipe], pretrained: Mapping[Role, HuggingFaceBase]
) -> dict[Role, str]:
    """Return the base that each column comes from: the first of its ancestors that has none, or is no column.

    The column "base" comes from itself, even if it continues a model that is no column.

    Args:
        recipes: Runs by column.
        pretrained: Models that are measured as they are, which have no base.
    """
    origins: dict[Role, str] = {role: role for role in pretrained}
    for role in recipes:
        origin: str = role
        # Of several runs each step is to another one.
        for _ in recipes:
            base = recipes[origin].base if origin in recipes else None
            if base is not None and origin != "base":
                origin = _find_column(base, recipes, pretrained) or str(base)
        origins[role] = origin
    return origins


def find_parents(
    recipes: Mapping[Role, Recipe], pretrained: Mapping[Role, HuggingFaceBase]
) -> dict[Role, Role]:
    """Return the columns that columns continue, of those whose base is a column."""
    parents = {
        role: _find_column(recipe.base, recipes, pretrained) for role, recipe in recipes.items()
    }
    return {role: parent for role, parent in parents.items() if parent is not None}


def _find_column(
    base: object, recipes: Mapping[Role, Recipe], pretrained: Mapping[Role, HuggingFaceBase]
) -> Role | None:
    names = {**{role: r.name for role, r in recipes.items()}, **pretrained}
    return next((role for role, name in names.items() if base is not None and name == base), None)


def _check_names(recipes: Mapping[Role, Recipe]) -> None:
    """Refuse a run that is listed twice: its files are one run's."""
    role_by_name: dict[str, Role] = {}
    for role, recipe in recipes.items():
        other = role_by_name.setdefault(recipe.name, role)
        if other != role:
            raise RecipeError(
                f"recipes.{role}: run {recipe.name!r} is also recipes.{other}: list each run once"
            )


def _check_bases(recipes: Mapping[Role, Recipe], pretrained_base: HuggingFaceBase | None) -> None:
    """Refuse runs that continue neither the comparison's base nor another of its runs."""
    base = recipes["base"].name if "base" in recipes else pretrained_base
    # A comparison may leave out the base; then the others' bases are not checked.
    if base is None:
        return
    names = {recipe.name for recipe in recipes.values()}
    for role, recipe in recipes.items():
        if role == "base" or recipe.base == base or recipe.base in names:
            continue
        # Another base, under a name of its own.
        if recipe.base is None and role not in ROLES:
            continue
        raise RecipeError(
            f"base: {role} has {str(recipe.base)!r}, but the comparison's base is {str(base)!r}: change one of them"
        )


def _check_same_settings(role: Role, recipe: Recipe, other_role: Role, other: Recipe) -> None:
    # One by one, so that the message names the setting that differs and not two groups of settings.
    fields = _flatten(evaluation_settings(recipe))
    other_fields = _flatten(evaluation_settings(other))
    for (field, value), (_, other_value) in zip(fields, other_fields, strict=True):
        if value != other_value:
            raise RecipeError(
                f"{field}: {role} has {value!r}, {other_role} has {other_value!r}: make them equal, otherwise the runs "
                "are not evaluated on the same text"
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
