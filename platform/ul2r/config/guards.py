"""What is done about training that goes wrong, and which steps are profiled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ul2r.config.strict_model import PositiveInt, StrictModel

Action = Literal["ignore", "stop", "skip", "rewind"]


class Guards(StrictModel):
    """Checks of each step before its update is applied, by numbers that all ranks have alike.

    "skip" leaves the batch out and takes the same step on the next one. "rewind" goes back to the last checkpoint and
    leaves out the batches since (PaLM, arXiv 2204.02311, 5.1); before the first checkpoint it skips. "stop" ends the
    run and keeps the evidence, as does an empty budget.
    """

    non_finite: Literal["stop", "skip", "rewind"] = "skip"
    """Where the loss or the gradient norm is no number: such an update is never applied."""
    loss_spike: Action = "rewind"
    """Where the loss is above what the last steps let expect of the batch's denoisers: the weights are damaged."""
    gradient_spike: Action = "skip"
    """Where the gradient norm is above that of the last steps: the batch is bad."""
    deviations: float = Field(default=10, gt=3)
    """Robust standard deviations above the median that make a spike; see `ul2r.train.monitor.guards`."""
    window: int = Field(default=128, ge=8, le=2048)
    """Steps that the median is of; before as many were taken, nothing is a spike."""
    max_skips: int = Field(default=16, ge=0)
    """Batches that may be skipped one by one among any `window` successive ones."""
    max_rewinds: int = Field(default=8, ge=0)
    """Times that the run may go back in all."""
    hang_timeout_s: float = Field(default=1200, gt=0, lt=1800)
    """A worker that stands still for this long says who is behind, and ends, so that all are started again. Longer
    than any step, measurement or checkpoint takes, and shorter than the 1800 after which torch gives up by itself."""


class Profile(StrictModel):
    """Steps that are recorded by torch's profiler."""

    steps: tuple[PositiveInt, ...] = Field(default=(), max_length=16)
    """Numbers of steps, from 1; rank 0 writes a trace of each to the run's folder and to MLflow."""
