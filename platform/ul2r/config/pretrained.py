"""What a run continues: another run, or a model that this platform did not write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from ul2r.config.strict_model import StrictModel

Storage = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RunName = Annotated[str, Field(pattern=RUN_NAME)]


class HuggingFaceBase(StrictModel):
    """A base in Hugging Face form."""

    hf: str = Field(min_length=1)
    """Its folder, or its name on the Hub (owner/name)."""

    def __str__(self) -> str:
        """As people name it."""
        return self.hf


class MegatronBase(StrictModel):
    """A base that Megatron-LM, Megatron-Bridge or Megatron-Core wrote."""

    megatron: Storage
    """Folder of a `torch_dist` checkpoint, or of several and latest_checkpointed_iteration.txt."""

    def __str__(self) -> str:
        """As people name it."""
        return str(self.megatron)


def _one_kind(value: Any) -> Any:  # noqa: ANN401  whatever stood in the YAML
    """Refuse what is none of the three kinds of base in words of its own; pydantic would speak of all three."""
    kinds = "a run's name, {hf: FOLDER_OR_HUB_ID} or {megatron: FOLDER}"
    if isinstance(value, dict) and not (
        value.keys() in ({"hf"}, {"megatron"})
        and all(isinstance(v, str | Path) for v in value.values())
    ):
        raise ValueError(f"{kinds} is needed, got {value!r}")
    if isinstance(value, str) and not re.fullmatch(RUN_NAME, value):
        raise ValueError(f"{value!r} is no run's name: {kinds} is needed")
    return value


Base = Annotated[RunName | HuggingFaceBase | MegatronBase, BeforeValidator(_one_kind)]
