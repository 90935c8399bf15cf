"""Counts of what a token store leaves out, by reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ul2r.data.prepare.suffixes import TOKEN_SUFFIXES, compression_suffix, text_suffix

MAX_SHOWN_REASONS = 8
MAX_EXAMPLE_CHARACTERS = 200
HINTS = {
    ".json files": "name them in data.corpus, as in FOLDER/*.json, if each line is a record",
    "token files": "name them one by one in data.corpus",
}
"""Ways to have them read nevertheless."""


@dataclass(frozen=True)
class Count:
    """Files or documents left out for one reason.

    Attributes:
        count: Number of them.
        num_bytes: Their bytes.
        example: Path of the first, with its line or row if it is a document.
    """

    count: int
    num_bytes: int
    example: str


@dataclass
class LeftOut:
    """Counts of files, folders and documents by the reason why they are left out."""

    counts: dict[str, Count] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, num_bytes: int, example: str | Callable[[], str]) -> None:
        """Count a file or document.

        Args:
            reason: Why it is left out.
            num_bytes: Its bytes.
            example: Its path, with its line or row; a function that costs something is called for the first only.
        """
        if reason in self.counts:
            example = ""
        elif callable(example):
            example = example()
        self._add(reason, Count(1, num_bytes, example[:MAX_EXAMPLE_CHARACTERS]))

    def add_file(self, path: Path, num_bytes: int) -> None:
        """Count a file that is left out for its suffix."""
        self.add(_describe_kind(path), num_bytes, str(path))

    def update(self, other: LeftOut) -> None:
        """Add the counts of others, which come after these."""
        for reason, count in other.counts.items():
            self._add(reason, count)

    def describe(self) -> str:
        """Return the counts in one line, those of the most first."""
        return ", ".join(self._describe_counts())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the counts as plain JSON values."""
        return {
            reason: {"count": count.count, "bytes": count.num_bytes, "example": count.example}
            for reason, count in self.counts.items()
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Mapping[str, Any]]) -> LeftOut:
        """Read what `to_dict` returned."""
        return cls(
            {
                reason: Count(count["count"], count["bytes"], count["example"])
                for reason, count in tree.items()
            }
        )

    def _add(self, reason: str, more: Count) -> None:
        old = self.counts.get(reason, Count(0, 0, more.example))
        self.counts[reason] = Count(
            old.count + more.count, old.num_bytes + more.num_bytes, old.example
        )

    def _describe_counts(self) -> Iterator[str]:
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1].count, item[0]))
        for reason, count in ordered[:MAX_SHOWN_REASONS]:
            size = f"{count.num_bytes / 1e6:.2f} MB, " if count.num_bytes >= 5_000 else ""
            hint = f"; {HINTS[reason]}" if reason in HINTS else ""
            yield f"{count.count:,} {reason} ({size}first {count.example}{hint})"
        rest = ordered[MAX_SHOWN_REASONS:]
        if rest:
            yield f"{sum(count.count for _, count in rest):,} for {len(rest)} other reasons"


def _describe_kind(path: Path) -> str:
    if path.suffix in TOKEN_SUFFIXES:
        return "token files"
    suffix = f"{text_suffix(path)}{compression_suffix(path)}"
    # Names such as "notes.2024-01-01" have no suffix that tells anything: one reason for all of them.
    if not re.fullmatch(r"(\.[a-z][a-z0-9_+-]{0,11}){1,2}", suffix):
        return "files of other kinds"
    return f"{suffix} files"
