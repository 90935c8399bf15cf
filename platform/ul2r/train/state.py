"""The counters of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class TrainState:
    """Counters of a run after an optimizer step.

    Attributes:
        step: Optimizer steps that this run has taken.
        tokens: Row positions trained on, including those of the runs that its weights come from.
        flops: Model FLOPs spent, counted likewise.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0

    def advance(self, tokens: int, flops: float) -> Self:
        """Return the counters after one more step."""
        return replace(
            self, step=self.step + 1, tokens=self.tokens + tokens, flops=self.flops + flops
        )
