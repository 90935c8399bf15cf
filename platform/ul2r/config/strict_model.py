"""The base of every part of a recipe: immutable, with unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]


class StrictModel(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, tree: Any) -> Any:  # noqa: ANN401  whatever stood in the YAML
        """Refuse true and false for numbers; pydantic takes them for 1 and 0, and YAML reads "yes" as true."""
        if isinstance(tree, dict):
            for key, field in cls.model_fields.items():
                if field.annotation in (int, float) and isinstance(tree.get(key), bool):
                    raise ValueError(f"{key}={str(tree[key]).lower()}: a number is needed")
        return tree
