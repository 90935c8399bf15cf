"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps of its own, tokens and FLOPs with its ancestors'."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
