"""Held-out losses during training against the FLOPs spent on them, from MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ul2r.tracking.mlflow import read_metric_history


@dataclass(frozen=True)
class Curve:
    """One run's held-out losses at N moments of its training.

    Attributes:
        flops: Training FLOPs, the base's included, rising; N of them.
        causal: Loss of plain text in nats per token.
        denoisers: Mean of the denoisers' losses, in nats per token.
    """

    flops: tuple[float, ...]
    causal: tuple[float, ...]
    denoisers: tuple[float, ...]


def load_curve(uri: str, run_id: str, denoisers: Sequence[str]) -> Curve:
    """Read a run's curve; moments that lack one of the metrics are left out.

    Args:
        uri: The tracking server.
        run_id: The run.
        denoisers: Names of those that the mean is taken over.

    Raises:
        ServiceError: If the server fails.
    """
    reached = dict(read_metric_history(uri, run_id, "progress/eflops"))
    causal = dict(read_metric_history(uri, run_id, "held_out/loss/causal"))
    each = [dict(read_metric_history(uri, run_id, f"held_out/loss/{name}")) for name in denoisers]
    steps = sorted(set(reached).intersection(causal, *each))
    return Curve(
        flops=tuple(reached[step] * 1e18 for step in steps),
        causal=tuple(causal[step] for step in steps),
        denoisers=tuple(sum(losses[step] for losses in each) / len(each) for step in steps),
    )
