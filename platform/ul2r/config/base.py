"""Bases that this platform did not write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from ul2r.config.section import Section

Storage = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class HuggingFace(Section):
    """A base in Hugging Face form."""

    hf: str = Field(min_length=1)
    """Its folder, or its name on the Hub (owner/name)."""

    def __str__(self) -> str:
        """As people name it."""
        return self.hf


class Megatron(Section):
    """A base that Megatron-LM, Megatron-Bridge or Megatron-Core wrote."""

    megatron: Storage
    """Folder of a `torch_dist` checkpoint, or of several and latest_checkpointed_iteration.txt."""

    def __str__(self) -> str:
        """As people name it."""
        return str(self.megatron)
