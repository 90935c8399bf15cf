"""The base class of every section of a recipe: immutable, and unknown keys are errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """A frozen group of settings that refuses unknown keys, NaN and infinity."""

    # allow_inf_nan: YAML reads .nan and .inf as numbers, and no setting is meant to be one of them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, tree: Any) -> Any:  # noqa: ANN401  any YAML value
        """Refuse true and false for numbers: YAML reads "yes" as true, and pydantic converts it to 1."""
        # mode="before", since after validation true has become 1. A section that is an instance already passes through.
        if isinstance(tree, dict):
            for key, field in cls.model_fields.items():
                if field.annotation in (int, float) and isinstance(tree.get(key), bool):
                    raise ValueError(f"{key}={str(tree[key]).lower()} should be a number")
        return tree
