"""Responses to a training run that goes wrong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ul2r.config.strict_model import StrictModel

Action = Literal["ignore", "stop", "skip", "rewind"]


class Guards(StrictModel):
    """Checks of each step before its update is applied; what one rank finds counts on all ranks.

    "skip" drops the batch and repeats the step with the next one. "rewind" goes back to the last checkpoint and drops
    the batches since then (PaLM, arXiv 2204.02311, 5.1); before the first checkpoint it skips. "stop" ends the run and
    keeps the evidence; so does any action whose budget is used up.
    """

    non_finite: Literal["stop", "skip", "rewind"] = "skip"
    """Action if the loss or the gradient norm is NaN or infinite. Such an update is never applied."""
    loss_spike: Action = "rewind"
    """Action if the loss is far above what recent steps predict for the batch's denoisers: the weights are damaged."""
    gradient_spike: Action = "skip"
    """Action if the gradient norm is far above that of recent steps: the batch is bad."""
    deviations: float = Field(default=10, gt=3)
    """Robust standard deviations above the median that count as a spike; see `ul2r.train.monitor.guards`."""
    window: int = Field(default=128, ge=8, le=2048)
    """Steps that the median is taken over; until that many were taken, nothing counts as a spike."""
    max_skips: int = Field(default=16, ge=0)
    """Batches that may be skipped one by one among any `window` successive ones."""
    max_rewinds: int = Field(default=8, ge=0)
    """Rewinds allowed in a whole run."""
    hang_timeout_s: float = Field(default=1200, gt=0)
    """A worker without progress for this long reports which ranks are behind, and exits so that all are restarted.
    Must be longer than any step, held-out batch or fsync of a file. Files that are still being written, remote copies
    and segments of a streamed store that the next batch waits for count as progress, for as long as they grow."""
    start_timeout_s: float = Field(default=3600, gt=0)
    """The same while workers start, up to the end of their first step, and while they load a checkpoint. The default is
    enough to verify and then load a checkpoint of 540B parameters (7.5 TB with its optimizer state) at 5 GB/s."""

    @property
    def collective_timeout_s(self) -> float:
        """Timeout of torch's collectives: longer than both limits, so that a rank that hangs is named first."""
        return 1.5 * max(self.hang_timeout_s, self.start_timeout_s)
