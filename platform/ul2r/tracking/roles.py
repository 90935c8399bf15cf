"""Roles of runs: their colors, and the tags that name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ul2r.config import Recipe

ROLE_COLORS: Mapping[str, str] = {
    "base": "#999999",
    "control": "#0072B2",
    "fim": "#009E73",
    "ul2r": "#D55E00",
}
"""Line color by role; distinguishable without color vision (Okabe and Ito 2008)."""

COMPARISON_ROLE = "comparison"
"""Role of the run that a comparison is recorded in."""
FEW_SHOT_ROLE = "few_shot"
"""Role of the run that a suite's results are recorded in."""
GAPS_ROLE = "gaps"
"""Role of the run that a model's gaps are recorded in."""
LADDER_ROLE = "ladder"
"""Role of the run that a ladder's figures are recorded in."""


def describe_origin(recipe: Recipe, parent: str | None) -> dict[str, str]:
    """Return the tags that name a run's role and what it continues.

    Args:
        recipe: The run.
        parent: Id of the run that it continues, None if that has no record here.
    """
    base = {"ul2r.base": str(recipe.base)} if recipe.base else {}
    # Not MLflow's own tag of a parent, whose runs its page folds away below it.
    tracked = {"ul2r.parent": parent} if parent else {}
    return {"ul2r.role": recipe.role or "none", **base, **tracked}


def find_base_folder(recipe: Recipe) -> Path | None:
    """Return the folder of the run that a recipe continues, None if its base is not a run of this storage."""
    return recipe.storage_paths.run(recipe.base).folder if isinstance(recipe.base, str) else None
