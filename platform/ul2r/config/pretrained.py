"""The model that a run continues: another run's, or one that this platform did not write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ul2r.config.field_types import RUN_NAME, AbsolutePath, RunName
from ul2r.config.strict_model import StrictModel


class HuggingFaceBase(StrictModel):
    """A base in Hugging Face format."""

    hf: str = Field(min_length=1)
    """Its folder, or its name on the Hub (owner/name)."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the Hub; by default its main branch. Replaced by the commit when a recipe is read."""

    def __str__(self) -> str:
        """Return its folder or name, for messages."""
        return self.hf


class MegatronBase(StrictModel):
    """A base that Megatron-LM, Megatron-Bridge or Megatron-Core wrote."""

    megatron: AbsolutePath
    """Folder of a `torch_dist` checkpoint, or of several with their latest_checkpointed_iteration.txt."""

    def __str__(self) -> str:
        """Return its folder, for messages."""
        return str(self.megatron)


def _check_form(value: Any) -> Any:  # noqa: ANN401  any YAML value
    """Refuse a base of none of the three forms with one message; pydantic would report all three."""
    forms = "should be a run's name, {hf: FOLDER_OR_HUB_ID} or {megatron: FOLDER}"
    if not isinstance(value, dict | str | StrictModel | None):
        raise ValueError(f"{forms}, got {value!r}")  # noqa: TRY004  pydantic reports a ValueError only
    if isinstance(value, dict) and not (
        value.keys() in ({"hf"}, {"hf", "revision"}, {"megatron"})
        and all(isinstance(v, str | Path | None) for v in value.values())
    ):
        raise ValueError(f"{forms}, got {value!r}")
    if isinstance(value, str) and not re.fullmatch(RUN_NAME, value):
        raise ValueError(f"{forms}, got {value!r}")
    return value


Base = Annotated[RunName | HuggingFaceBase | MegatronBase, BeforeValidator(_check_form)]


def check_base(base: Base | None, name: str, *, continue_from_base: bool) -> None:
    """Refuse a run that continues itself, and one that goes on in the text of a base whose text is not known.

    Args:
        base: The base.
        name: Name of the run.
        continue_from_base: See `Data`.

    Raises:
        ValueError: With the name.
    """
    # Only a run's name can be equal to it: the other forms are not strings.
    if base == name:
        raise ValueError(f"base={base} is the run's own name: set base to the run to continue")
    if continue_from_base and (base is None or isinstance(base, MegatronBase)):
        raise ValueError(
            "data.continue_from_base=true needs a base that records the text it was trained on: a run of this storage, "
            "or an export of this project; name one, or set data.continue_from_base to false"
        )
