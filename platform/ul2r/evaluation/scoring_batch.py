"""Rows that score known targets after known inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.objective import Batch

Tokens = npt.NDArray[np.int32]


def build_scoring_batch(
    inputs: Tokens, targets: Tokens, counts: npt.NDArray[np.bool_], *, bidirectional: bool
) -> Batch:
    """One example in each row: inputs, then targets whose losses are asked for.

    Args:
        inputs: int32 (B, P), P >= 1.
        targets: int32 (B, T); each sees the inputs and the targets before it.
        counts: bool (B, T), the targets whose loss counts.
        bidirectional: Whether inputs see all inputs, or only those before them.

    Returns:
        Rows of S = P + T - 1 positions.
    """
    tokens = np.concatenate((inputs, targets), axis=1)  # (B, P + T)
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    shape = rows, length
    seen_inputs = inputs.shape[1]
    place = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    mask = np.zeros(shape, np.uint8)
    mask[:, seen_inputs - 1 :] = counts
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=mask,
        kv_start=np.zeros(shape, np.int32),
        kv_end=np.maximum(place + 1, seen_inputs if bidirectional else 0).astype(np.int32),
        position_ids=place.copy(),
        denoiser_ids=np.zeros(shape, np.int8),
        sample_ids=np.arange(rows, dtype=np.int64)[:, None],
    )


def columns(rows: int, *parts: int | npt.NDArray[Any]) -> Tokens:
    """Tokens side by side: an id stands in every row, an array (rows, n) gives n columns."""
    return np.concatenate(
        [
            np.full((rows, 1), part, np.int32) if isinstance(part, int) else part.astype(np.int32)
            for part in parts
        ],
        axis=1,
    )
