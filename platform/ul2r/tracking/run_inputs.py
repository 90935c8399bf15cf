"""Text that a run reads, as MLflow lists it among the inputs of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Context = Literal["train", "held_out"]
"""Use of a text."""


@dataclass(frozen=True)
class RunInput:
    """One side of a token store.

    Attributes:
        name: Name for people.
        context: Use of the text.
        fingerprint: Digest of the store.
        folder: The store.
        sources: Files of text or stores that it was made from.
        num_tokens: Its tokens; None if the store is still growing.
        num_documents: Its documents, as `num_tokens`.
    """

    name: str
    context: Context
    fingerprint: str
    folder: Path
    sources: Sequence[str] = ()
    num_tokens: int | None = None
    num_documents: int | None = None

    def describe(self) -> str:
        """Return a line for people."""
        size = "a growing number of" if self.num_tokens is None else f"{self.num_tokens:,}"
        sources = ", ".join(self.sources)
        return f"{size} tokens of {sources or self.folder}, fingerprint `{self.fingerprint[:12]}`"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "folder": str(self.folder), "sources": list(self.sources)}
