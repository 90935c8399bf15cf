"""Raising the number of steps of a run that has checkpoints.

The result must equal, bit for bit, a run that had the higher number from its start. Of all that a run computes only
the learning rate depends on that number, so the rates of the steps already taken decide.
"""

from __future__ import annotations

from typing import Any

from ul2r.config.optimizer import Optimizer

SCHEDULE_SETTINGS = ("warmup_fraction", "decay_fraction")
"""Settings of the optimizer that may change with the number of steps, as long as no rate of a step taken does."""


def find_obstacle(
    saved: Optimizer, saved_steps: int, wanted: Optimizer, wanted_steps: int, step: int
) -> str | None:
    """Return why a run cannot be prolonged, and what to change; None if it can.

    Args:
        saved: The checkpoint's optimizer.
        saved_steps: Steps of its run.
        wanted: The recipe's optimizer.
        wanted_steps: Its steps, more than `saved_steps`.
        step: Step of the checkpoint.
    """
    warmup = saved.warmup_steps(saved_steps)
    new_warmup = wanted.warmup_steps(wanted_steps)
    if warmup != new_warmup and step > 0:
        return (
            f"the run warmed up for {warmup} steps, with optimizer.warmup_fraction={wanted.warmup_fraction:g} it would "
            f"have been {new_warmup}: set optimizer.warmup_fraction={warmup / wanted_steps:.6g}"
        )
    if step <= warmup or saved.schedule == "constant":
        return None

    if saved.schedule == "cosine":
        return (
            "under optimizer.schedule=cosine the learning rates of the steps already taken depend on training.steps: "
            "set training.steps back"
        )
    decay_start = saved_steps - saved.decay_steps(saved_steps)
    if step > decay_start:
        return (
            f"under optimizer.schedule=wsd the learning rate has fallen since step {decay_start}: set training.steps "
            f"back, or name a checkpoint of step {decay_start} or earlier in the file `latest`"
        )
    new_decay_start = wanted_steps - wanted.decay_steps(wanted_steps)
    if step > new_decay_start:
        return (
            f"with optimizer.decay_fraction={wanted.decay_fraction:g} the learning rate would have fallen since step "
            f"{new_decay_start}: lower it, or raise training.steps further"
        )
    return None


def without_schedule(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's settings without those that may change with the number of steps."""
    return {key: value for key, value in optimizer.items() if key not in SCHEDULE_SETTINGS}
