"""Steps that are recorded by torch's profiler."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel


class Profile(StrictModel):
    """Steps that are recorded by torch's profiler."""

    steps: tuple[PositiveInt, ...] = Field(default=(), max_length=16)
    """Step numbers, from 1; rank 0 writes a trace of each to the run's folder and to MLflow."""
