"""Batches that score given targets after given inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.held_out_windows import TokenArray
from ul2r.objective import Batch


def build_scoring_batch(
    inputs: TokenArray,
    targets: TokenArray,
    target_mask: npt.NDArray[np.bool_],
    *,
    bidirectional: bool,
) -> Batch:
    """Build a batch with one example per row: inputs, then the targets to score.

    Args:
        inputs: int32 (B, P), P >= 1.
        targets: int32 (B, T); each attends to the inputs and the targets before it.
        target_mask: bool (B, T), True for targets whose loss counts.
        bidirectional: True if inputs attend to all inputs, False if only to those before them.

    Returns:
        A batch of B rows of S = P + T - 1 positions.
    """
    tokens = np.concatenate((inputs, targets), axis=1)  # (B, P + T)
    num_rows = tokens.shape[0]
    length = tokens.shape[1] - 1
    num_inputs = inputs.shape[1]
    shape = (num_rows, length)

    position_ids = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    # Inputs attend to the whole prefix, and every target to all tokens before it.
    prefix = num_inputs if bidirectional else 0
    # The last input predicts the first target.
    loss_mask = np.zeros(shape, np.uint8)
    loss_mask[:, num_inputs - 1 :] = target_mask

    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=loss_mask,
        kv_start=np.zeros(shape, np.int32),
        kv_end=np.maximum(position_ids + 1, prefix).astype(np.int32),
        position_ids=position_ids,
        # Scoring reads neither denoiser nor sample ids.
        denoiser_ids=np.zeros(shape, np.int8),
        sample_ids=np.arange(num_rows, dtype=np.int64)[:, None],
    )


def concat_columns(num_rows: int, *parts: int | npt.NDArray[Any]) -> TokenArray:
    """Concatenate tokens along rows: an id becomes a column, an array (num_rows, n) n columns."""
    columns = [
        np.full((num_rows, 1), part, np.int32) if isinstance(part, int) else part.astype(np.int32)
        for part in parts
    ]
    return np.concatenate(columns, axis=1)
