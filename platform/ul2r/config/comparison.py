"""A comparison of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from ul2r.config.field_types import AbsolutePath, RunName
from ul2r.config.strict_model import StrictModel
from ul2r.config.tracking import Tracking


def _resolve_recipe(path: Path, info: ValidationInfo) -> Path:
    """Return a recipe's path relative to the folder of the comparison's file, which `load` passes as context."""
    # A comparison that is made in Python has no context; its recipes are then relative to the working directory. An
    # absolute path stays as it is: pathlib drops what stands in front of it.
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / path


class Comparison(StrictModel):
    """Runs to compare: recipes by the role of each."""

    name: RunName
    storage: AbsolutePath
    """Folder of the runs; it replaces the recipes' own."""
    recipes: dict[
        Literal["base", "ul2r", "control"], Annotated[Path, AfterValidator(_resolve_recipe)]
    ]
    """Recipe files, relative to the comparison's own file."""
    tracking: Tracking = Tracking()
