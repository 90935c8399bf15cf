"""Settings of the model that this folder belongs to, written at its export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Settings:
    """All that generation depends on."""

    attention: Literal["prefix", "causal"] = "causal"
    """Attention over inputs in training: "prefix" is in both directions."""
    denoising: bool = False
    """True if it was trained on denoisers, and so knows modes and sentinels."""
    eos: int = 0
    """Token that ends a text, and pads."""
    modes: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of each mode."""
    sentinels: list[int] = field(default_factory=list)
    """Tokens that stand for slots, in order."""
    eos_after_inputs: bool = False
    """True if eos closes all inputs."""
    prefix_sentinel: bool = False
    """True if a sentinel closes inputs that are continued, and begins the continuation."""
    not_text: list[tuple[int, int]] = field(default_factory=list)
    """Ranges [first, end) of ids that no text has: special tokens and unused rows of the embedding."""
    inside: dict[str, Any] | None = None
    """Components of the tokenizer to replace for text that does not begin a document; None if there are none."""


SETTINGS = Settings()
