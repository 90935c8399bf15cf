"""Held-out losses during training against training FLOPs, read from the runs' records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ul2r.tracking.names import CAUSAL, PETAFLOPS, find_former_name, name_held_out_loss
from ul2r.tracking.store import TrackingStore


@dataclass(frozen=True)
class LossCurve:
    """Held-out losses of one run at N steps of its training.

    Attributes:
        flops: Training FLOPs including the base's, ascending; N values.
        causal_loss: Loss of plain text in nats per token.
        denoiser_loss: Mean of the denoisers' losses in nats per token.
    """

    flops: tuple[float, ...]
    causal_loss: tuple[float, ...]
    denoiser_loss: tuple[float, ...]


def load_loss_curve(store: TrackingStore, run_id: str, denoisers: Sequence[str]) -> LossCurve:
    """Return the curve of a run; steps that lack one of the metrics are left out.

    Args:
        store: Where the run is recorded.
        run_id: The run.
        denoisers: Names of the denoisers to average over.

    Raises:
        ServiceError: If the server fails.
    """
    petaflops = _read_history(store, run_id, PETAFLOPS)
    causal = _read_history(store, run_id, name_held_out_loss(CAUSAL))
    by_denoiser = [_read_history(store, run_id, name_held_out_loss(name)) for name in denoisers]

    # Progress is logged more often than held-out losses: only steps with all metrics count.
    steps = sorted(set(petaflops).intersection(causal, *by_denoiser))
    return LossCurve(
        flops=tuple(petaflops[step] * 1e15 for step in steps),
        causal_loss=tuple(causal[step] for step in steps),
        denoiser_loss=tuple(
            sum(losses[step] for losses in by_denoiser) / len(by_denoiser) for step in steps
        ),
    )


def _read_history(store: TrackingStore, run_id: str, metric: str) -> dict[int, float]:
    """Return a metric by step, of steps that were logged under its former name as well."""
    values = dict[int, float]()
    former = find_former_name(metric)
    if former is not None:
        name, factor = former
        values = {step: value * factor for step, value in store.read_metric_history(run_id, name)}
    # Last: of a step that was taken again after a change of names, the later value counts.
    return values | dict(store.read_metric_history(run_id, metric))
