"""The token ids that an objective uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Vocabulary:
    """Size of a tokenizer and the ids of its special tokens."""

    size: int
    """Entries of the tokenizer, special tokens included."""
    eos: int
    modes: Mapping[str, tuple[int, ...]]
    """Tokens of each mode, S2S, NLU and NLG: one token with no other meaning, or the pieces of its name as text."""
    sentinels: tuple[int, ...]
    """Ids of the sentinels in order of use: the first stands for an example's first span."""
    modes_are_text: bool = False
    """True if modes are pieces of text, which documents may contain as well."""

    def __post_init__(self) -> None:
        modes = [token for tokens in self.modes.values() for token in tokens]
        assert all(self.modes.values()), "a mode has no token"

        # Modes that are pieces of text may share pieces.
        special = (self.eos, *self.sentinels, *([] if self.modes_are_text else modes))
        assert len(set(special)) == len(special), "special tokens share an id"
        is_known = all(0 <= token < self.size for token in (*special, *modes))
        assert is_known, "an id lies outside the tokenizer"

    @property
    def non_text_ids(self) -> frozenset[int]:
        """Ids of the modes and sentinels that no document contains."""
        modes = [token for tokens in self.modes.values() for token in tokens]
        return frozenset((*self.sentinels, *([] if self.modes_are_text else modes)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back."""
        # JSON has no tuples, and a vocabulary that was read back has to equal the one that was written.
        modes = {mode: list(tokens) for mode, tokens in self.modes.items()}
        return asdict(self) | {"modes": modes, "sentinels": list(self.sentinels)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Return the vocabulary that `to_dict` wrote.

        Raises:
            KeyError: If a part is missing.
        """
        return cls(
            size=tree["size"],
            eos=tree["eos"],
            modes={mode: tuple(tokens) for mode, tokens in tree["modes"].items()},
            sentinels=tuple(tree["sentinels"]),
            modes_are_text=tree["modes_are_text"],
        )
