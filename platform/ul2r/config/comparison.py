"""A comparison of runs and pretrained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from ul2r.config.field_types import AbsolutePath, RunName
from ul2r.config.named_recipes import find_recipe
from ul2r.config.pretrained import HuggingFaceBase
from ul2r.config.strict_model import StrictModel
from ul2r.config.tracking import Tracking


def _check_form(value: Any) -> Any:  # noqa: ANN401  any YAML value
    """Refuse what is of neither form with one message; pydantic would report both."""
    is_model = (
        isinstance(value, dict)
        and value.keys() in ({"hf"}, {"hf", "revision"})
        and all(isinstance(v, str) and v for v in value.values())
    )
    if not is_model and not isinstance(value, str | Path | HuggingFaceBase):
        raise ValueError(f"should be a recipe's file or {{hf: FOLDER_OR_HUB_ID}}, got {value!r}")
    return value


def _resolve_recipe(entry: Path | HuggingFaceBase, info: ValidationInfo) -> Path | HuggingFaceBase:
    """Return a recipe's path relative to the folder of the comparison's file, which `load` passes as context."""
    if isinstance(entry, HuggingFaceBase):
        return entry  # as in a recipe, relative to the working directory
    # A comparison that is made in Python has no context; its recipes are then relative to the working directory. An
    # absolute path stays as it is: pathlib drops what stands in front of it.
    folder: Path = (info.context or {}).get("folder", Path())
    return find_recipe(entry, folder)


class Comparison(StrictModel):
    """Runs to compare, and models as they are: the columns of a table."""

    name: RunName
    storage: AbsolutePath
    """Folder of the runs; it replaces the recipes' own."""
    recipes: dict[
        RunName,
        Annotated[
            Path | HuggingFaceBase, AfterValidator(_resolve_recipe), BeforeValidator(_check_form)
        ],
    ]
    """Columns by name, any number: recipe files, relative to the comparison's own file, names of recipes that come with
    the package, and `{hf: FOLDER_OR_HUB_ID}` for a Hugging Face model that is measured as it is. Columns named base,
    control, fim and ul2r come first, and a recipe with a `role` may be listed under one of these names only if it is
    its own."""
    tracking: Tracking = Tracking()
