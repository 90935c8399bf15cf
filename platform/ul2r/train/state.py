"""How far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: steps of its own, tokens and FLOPs with its ancestors'."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0


def summary(metrics: Mapping[str, float]) -> str:
    """What a line of progress says of a step besides its rate: loss, MFU where known, batches skipped where any."""
    said = [f"loss {metrics['train/loss']:.3f}"]
    if "train/mfu" in metrics:
        said.append(f"MFU {metrics['train/mfu']:.1%}")
    if metrics["train/skipped_batches"]:
        said.append(f"{metrics['train/skipped_batches']:.0f} batches skipped")
    return ", ".join(said)
