"""A ladder: runs of several sizes, budgets, arms and seeds, for scores over training compute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, model_validator

from ul2r.config.field_types import AbsolutePath, PositiveInt, RunName
from ul2r.config.named_recipes import find_recipe
from ul2r.config.strict_model import StrictModel
from ul2r.config.tracking import Tracking

BASE = "base"
"""Arm that the others continue."""
DEFAULT_METRICS = ("causal_loss", "second_half_loss", "infill_loss", "infill_edit_similarity")


def _resolve_recipe(path: Path, info: ValidationInfo) -> Path:
    """Return a recipe's path relative to the folder of the ladder's file, which `load` passes as context."""
    return find_recipe(path, (info.context or {}).get("folder", Path()))


class Ladder(StrictModel):
    """Runs of every size, budget and seed in every arm."""

    name: RunName
    storage: AbsolutePath
    """Folder of the runs; it replaces the recipes' own."""
    arms: dict[RunName, Annotated[Path, AfterValidator(_resolve_recipe)]]
    """Recipes by arm: `base`, and those that continue it, such as control, ul2r and fim, all for the same tokens."""
    sizes: dict[RunName, dict[str, Any]] = Field(min_length=1)
    """Settings by size, laid over every arm's recipe: in groups, as `load` makes them of dotted keys too."""
    budgets: tuple[PositiveInt, ...] = Field(min_length=1)
    """Steps of the base, rising. With a constant schedule each budget goes on from the one before it, so that they are
    checkpoints of one training; with any other each is a training of its own."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(default=(1,), min_length=1)
    extra_fraction: float | None = Field(default=None, gt=0)
    """Tokens of the arms that continue the base, as a fraction of the base's; by default those of their recipes."""
    metrics: tuple[str, ...] = Field(default=DEFAULT_METRICS, min_length=1)
    """Held-out metrics of the figure. The means of few-shot suites that the recipes list come first."""
    tracking: Tracking = Tracking()
    """It replaces the recipes' own."""
    _file: Path = PrivateAttr(default=Path("ladder"))

    @property
    def file(self) -> Path:
        """The file that it was read from, for messages."""
        return self._file

    @model_validator(mode="after")
    def _keep_file(self, info: ValidationInfo) -> Self:
        self._file = (info.context or {}).get("file", self._file)
        return self

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if BASE not in self.arms or len(self.arms) < 2:
            raise ValueError(
                f"arms={', '.join(self.arms) or 'none'}: name {BASE} and at least one that continues it"
            )
        for name in ("budgets", "seeds", "metrics"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} has a value twice: list each once")
        if list(self.budgets) != sorted(self.budgets):
            raise ValueError(f"budgets={list(self.budgets)} should rise")
        return self
