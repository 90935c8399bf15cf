"""Measurements on held-out text."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.denoisers import MIXTURE_PRESETS
from ul2r.config.field_types import PositiveInt
from ul2r.config.objective import Mixture
from ul2r.config.strict_model import StrictModel


class Evaluation(StrictModel):
    """Measurements on held-out text, during training (loss of each denoiser) and after it."""

    mixture: Mixture = MIXTURE_PRESETS["ul2r"]
    """Denoisers whose losses are measured: the same rows for every run, whatever it trains on."""
    num_rows: int = Field(default=64, ge=2)
    """Held-out rows for perplexity, each denoiser's loss and second-half loss; a standard error needs at least 2."""
    num_infill_examples: int = Field(default=64, ge=2)
    infill_span_length: PositiveInt = 3
    """Tokens of each masked span."""
    infill_context_length: PositiveInt = 64
    """Tokens shown on each side of the span."""
