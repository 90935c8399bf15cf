"""The exported model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ul2r.config.strict_model import StrictModel


class Export(StrictModel):
    """Export and registration of a finished run."""

    registered_model: str | None = None
    """Name in MLflow's registry; by default the model is not registered."""
    alias: str = "champion"
    max_shard_gib: float = Field(default=4, gt=0)
    """Largest file of weights; writing one takes about as much memory."""
    checkpoint: Path | None = None
    """Checkpoint to export instead of the run's last one: an earlier one, or one that Megatron-LM wrote
    (`torch_dist`)."""
