"""Sliding windows of local layers, as intervals of keys (numpy only)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


def clip_to_window(kv_start: Ints, kv_end: Ints, window: int | None) -> tuple[Ints, Ints]:
    """Clip intervals to keys less than `window` positions away from the query, before and after it.

    Under a causal mask this is the usual window of the last `window` keys (Mistral 7B, arXiv 2310.06825, 2). Inputs
    that attend in both directions see as far ahead, as in a bidirectional Gemma 3 (transformers'
    `use_bidirectional_attention`), so that local layers stay local.

        query, window 2                        0  1  2  3  4
        [kv_start, kv_end) with a prefix of 4  04 04 04 04 05
        clipped to the window                  02 03 14 24 35

    Args:
        kv_start: First key each query sees, int32 (..., S).
        kv_end: One past the last, int32 (..., S); kv_start <= query < kv_end.
        window: Positions; None means unlimited.
    """
    if window is None:
        return kv_start, kv_end
    query = np.arange(kv_start.shape[-1], dtype=kv_start.dtype)
    return np.maximum(kv_start, query - window + 1), np.minimum(kv_end, query + window)
