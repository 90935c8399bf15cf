"""Names of checkpoints, and which of them stay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NAME = re.compile(r"step_(\d{8,})")


def name_of(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Step of a checkpoint by its name; -1 for any other name."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else -1


def finished_up_to(pointer: str, names: Iterable[str]) -> list[str]:
    """Finished checkpoints up to the one that a pointer names, newest first.

    A pointer that names none is damaged: then all of them may be taken. One that names a checkpoint which is not
    among `names` still gives it, so that it is missed.
    """
    last = step_of(pointer.strip())
    steps = {step_of(name) for name in names} - {-1}
    if last >= 0:
        steps = {step for step in steps if step <= last} | {last}
    return [name_of(step) for step in sorted(steps, reverse=True)]


@dataclass(frozen=True)
class Retention:
    """The last `keep` checkpoints stay, and each at a multiple of `keep_every` steps."""

    keep: int = 1
    keep_every: int | None = None

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Which of the checkpoints of `steps` stay."""
        ordered = sorted(steps)
        milestones = {step for step in ordered if self.keep_every and step % self.keep_every == 0}
        return set(ordered[-self.keep :]) | milestones
