"""Arms of a comparison, and the check that their recipes can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import evaluation_settings
from ul2r.inference import ExportMetadata

Role = Literal["base", "control", "ul2r"]
ROLES: tuple[Role, ...] = ("base", "control", "ul2r")
"""Columns of the table, from left to right."""


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
        role: The run's part in the comparison.
        metadata: Description of its export; tokens and FLOPs include the base's.
        scores: Its held-out scores.
    """

    role: Role
    metadata: ExportMetadata
    scores: Scores


def check_comparable(recipes: Mapping[Role, Recipe]) -> None:
    """Check that all recipes are evaluated on the same text and continue the same base.

    Raises:
        RecipeError: If they are not; it names the first field that differs and both values.
    """
    if len(recipes) < 2:
        raise RecipeError(
            f"recipes: {len(recipes)} given, but a comparison needs at least two of {', '.join(ROLES)}"
        )

    # A comparison may leave out the base; then the others' bases are not checked.
    base = recipes.get("base")
    for role, recipe in recipes.items():
        # A recipe without a role may be listed under any.
        if recipe.role not in (None, role):
            raise RecipeError(
                f"recipes.{role}: recipe {recipe.name!r} has role={recipe.role}: list it under that role"
            )
        if base is not None and role != "base" and str(recipe.base) != base.name:
            raise RecipeError(
                f"base: {role} has {str(recipe.base)!r}, but the comparison's base is {base.name!r}: change one of them"
            )

    # Neighbors suffice, since equality is transitive.
    for (role, recipe), (other_role, other) in pairwise(recipes.items()):
        _check_same_settings(role, recipe, other_role, other)


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
