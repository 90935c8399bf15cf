"""Roles of runs: their colors, and the tags that name them."""

from __future__ import annotations

from collections.abc import Mapping

from ul2r.config import Recipe

ROLE_COLORS: Mapping[str, str] = {"base": "#999999", "control": "#0072B2", "ul2r": "#D55E00"}
"""Line color by role; distinguishable without color vision (Okabe and Ito 2008)."""

COMPARISON_ROLE = "comparison"
"""Role of the run that a comparison is recorded in."""


def describe_origin(recipe: Recipe) -> dict[str, str]:
    """Return the tags that name a run's role and the run that it continues."""
    parent = {"ul2r.parent": str(recipe.base)} if recipe.base else {}
    return {"ul2r.role": recipe.role or "none", **parent}
