"""What a layer with a window sees of its intervals (numpy only)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


def clip_to_window(kv_start: Ints, kv_end: Ints, window: int | None) -> tuple[Ints, Ints]:
    """Cut intervals to keys less than `window` positions from the query, before it and behind it.

    Under a causal mask that is the usual window of the last `window` keys (Mistral 7B, arXiv 2310.06825, 2). Inputs
    that are seen in both directions see as far behind them, as in a Gemma 3 that is not causal (transformers'
    `use_bidirectional_attention`), so that local layers stay local.

        queries, window 2           0  1  2  3  4
        [kv_start, kv_end) of a prefix of 4   04 04 04 04 05
        within the window           02 03 14 24 35

    Args:
        kv_start: First key that each query sees, int32 (..., S).
        kv_end: One past the last, int32 (..., S); kv_start <= query < kv_end.
        window: Positions; None is all of them.
    """
    if window is None:
        return kv_start, kv_end
    query = np.arange(kv_start.shape[-1], dtype=kv_start.dtype)
    return np.maximum(kv_start, query - window + 1), np.minimum(kv_end, query + window)
