"""Checkpoints of a run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ul2r.config.field_types import FolderOrUrl, PositiveInt
from ul2r.config.strict_model import StrictModel

Change = Literal["data", "seed", "tokenizer"]
"""A difference between a checkpoint and its recipe that a user may accept."""


class Checkpoints(StrictModel):
    """When checkpoints are written, how many are kept, and where they are copied to."""

    every: PositiveInt = 100
    keep: PositiveInt = 2
    """Number of latest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Also keep each checkpoint at a multiple of this many steps; must be a multiple of `every`."""
    asynchronous: bool = True
    """Continue training while files are written. Weights and optimizer state then take twice the memory."""
    remote_dir: FolderOrUrl | None = None
    """Folder or fsspec URL (s3://, gs://) for copies of finished checkpoints. A run that has lost its own resumes from
    there."""
    accept_changes: tuple[Change, ...] = ()
    """Differences between a run's last checkpoint and its recipe that are allowed; all others are refused."""

    @model_validator(mode="after")
    def _check_keep_every(self) -> Self:
        # Otherwise most of the checkpoints to keep would never be written.
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every={self.every}: change either"
            )
        return self
