"""The token ids that an objective needs to know of a tokenizer."""

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
    modes: Mapping[str, int]
    """Ids of the mode tokens by mode: S2S, NLU, NLG."""
    sentinels: tuple[int, ...]
    """Ids of the sentinels in order of use: the first marks an example's first span."""

    def __post_init__(self) -> None:
        special = (self.eos, *self.modes.values(), *self.sentinels)
        assert len(set(special)) == len(special), "special tokens share an id"
        assert all(0 <= token < self.size for token in special), "an id lies outside the tokenizer"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back."""
        return asdict(self) | {"modes": dict(self.modes), "sentinels": list(self.sentinels)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            KeyError: If a part is missing.
        """
        return cls(
            size=tree["size"],
            eos=tree["eos"],
            modes=dict(tree["modes"]),
            sentinels=tuple(tree["sentinels"]),
        )
