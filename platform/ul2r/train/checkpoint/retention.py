"""Retention of old checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Rule that keeps the last `keep` checkpoints, and those at multiples of `keep_every` steps.

    Attributes:
        keep: Number of most recent checkpoints, at least 1.
        keep_every: In steps; None keeps no others.
    """

    keep: int = 1
    keep_every: int | None = None

    def select_kept(self, steps: Iterable[int]) -> set[int]:
        """Return the steps, of those given, whose checkpoints are kept."""
        ordered = sorted(steps)
        milestones = {step for step in ordered if self.keep_every and step % self.keep_every == 0}
        # The recipe requires keep >= 1: a slice from -0 would be the whole list.
        return set(ordered[-self.keep :]) | milestones
