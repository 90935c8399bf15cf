"""Held-out losses during training."""

from __future__ import annotations

from ul2r.config.field_types import PositiveInt
from ul2r.config.parallel import Parallel
from ul2r.config.strict_model import StrictModel
from ul2r.config.training import Training


class Validation(StrictModel):
    """Held-out losses during training, one per denoiser of `evaluation.mixture`, on the same rows for every run."""

    every: PositiveInt = 100
    """Steps between validations."""
    num_rows: PositiveInt = 8
    """Held-out rows for each denoiser."""


def check_validation_rows(validation: Validation, training: Training, parallel: Parallel) -> None:
    """Refuse validation rows that are not a whole number of microbatches on each replica.

    Raises:
        ValueError: With the sizes.
    """
    # Validation runs through the same pipeline schedule as training, in microbatches of the same size.
    rows = training.rows_per_microbatch(parallel)
    if validation.num_rows % rows:
        raise ValueError(
            f"validation.num_rows={validation.num_rows} is not a multiple of "
            f"training.micro_batch_size x data-parallel size = {training.micro_batch_size} x {parallel.data} "
            f"= {rows}: change either"
        )
