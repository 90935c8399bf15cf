"""Attention of the engine, in the networks of transformers: prompts without masks, and one token for every row.

transformers calls a registered function with the queries, keys and values of a layer, and passes it the keyword
arguments of the network's call (`AttentionInterface`, 5.23). Registered without a function for masks, it gets none
built (`masking_utils._preprocess_mask_arguments`): what a query sees is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

if TYPE_CHECKING:
    from torch import nn

IMPLEMENTATION = "ul2r_engine"
"""Name under which the function is registered."""
QUERY_CHUNK = 512
"""Queries that share a mask in a layer with a sliding window."""


class AttentionCall(Protocol):
    """Attention of one call of the network."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Return the attention of a layer, (B, S, H, D).

        Args:
            layer: Index of the layer.
            query: (B, H, S, D).
            key: (B, G, S, D), of the tokens of this call.
            value: As `key`.
            scale: Factor of the scores; None is 1 / sqrt(D).
            window: Keys at this distance and beyond are not seen; None sees all.
        """


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_call: AttentionCall,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,  # noqa: ANN401  settings that some families pass besides
) -> tuple[Tensor, None]:
    """Compute a layer's attention by the call's object; the interface of transformers."""
    assert attention_mask is None, "transformers has built a mask"
    layer: int = module.layer_idx  # type: ignore[assignment]  # modules have attributes of any type
    return attention_call.attend(
        layer, query, key, value, scale=scaling, window=sliding_window
    ), None


AttentionInterface.register(IMPLEMENTATION, attend)


def attend_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bidirectional: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return the attention of a whole prompt, without a mask of its length squared.

    Args:
        query: (B, H, S, D).
        key: (B, G, S, D).
        value: As `key`.
        bidirectional: True if every token sees every other; else those up to itself.
        scale: Factor of the scores.
        window: Sliding window, in both directions as in `ul2r.model.window`.

    Returns:
        (B, H, S, D).
    """
    num_repeats = query.shape[1] // key.shape[1]
    if num_repeats > 1:
        # The fused kernel of a CPU takes as many heads of keys as of queries.
        key = key.repeat_interleave(num_repeats, dim=1)
        value = value.repeat_interleave(num_repeats, dim=1)

    length = query.shape[2]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=not bidirectional, scale=scale
        )

    # A chunk of queries sees a band of keys, which one small mask describes.
    chunks = list[Tensor]()
    positions = torch.arange(length, device=query.device)
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        first_key = max(0, start - window + 1)
        last_key = min(length, end + window - 1) if bidirectional else end
        distance = positions[start:end, None] - positions[first_key:last_key]
        is_visible = distance.abs() < window
        if not bidirectional:
            is_visible &= distance >= 0
        chunks.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first_key:last_key],
                value[:, :, first_key:last_key],
                attn_mask=is_visible,
                scale=scale,
            )
        )
    return torch.cat(chunks, dim=2)
