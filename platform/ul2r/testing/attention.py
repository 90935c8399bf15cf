"""References for interval attention: its definition in float64, and torch's attention segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from ul2r.model.attention.segments import Segments


def compute_dense_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor
) -> Tensor:
    """Compute softmax attention in float64, differentiably.

    Args:
        query: (S, B, H, D).
        key: (S, B, G, D), G dividing H.
        value: (S, B, G, D).
        kv_start: (B, S) int, first key each query sees.
        kv_end: (B, S) int, one past the last.

    Returns:
        float64 (S, B, H, D).
    """
    group_size = query.shape[2] // key.shape[2]
    key, value = (tensor.double().repeat_interleave(group_size, dim=2) for tensor in (key, value))
    # (B, H, S, S); Megatron's tensors have the sequence first.
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), key) / query.shape[-1] ** 0.5
    position = torch.arange(key.shape[0], device=key.device)
    is_hidden = (position < kv_start[..., None]) | (position >= kv_end[..., None])  # (B, S, S)
    # A query that sees no key would be NaN: every interval holds at least the query itself.
    weights = scores.masked_fill(is_hidden[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value)


def attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float
) -> Tensor:
    """Compute variable-length attention, as a `Kernel`, by torch's SDPA on each segment; runs on any device."""
    num_queries = segments.query_bounds.diff().tolist()
    num_keys = segments.key_bounds.diff().tolist()
    group_size = query.shape[1] // key.shape[1]
    # One call for each segment, which have different lengths; slow, but without a mask that could itself be wrong.
    contexts = []
    for q, k, v in zip(
        torch.split(query, num_queries),
        torch.split(key.repeat_interleave(group_size, dim=1), num_keys),
        torch.split(value.repeat_interleave(group_size, dim=1), num_keys),
        strict=True,
    ):
        context = functional.scaled_dot_product_attention(  # (1, H, queries, D)
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            # Aligned at the end: a segment's last query sees all of its keys. torch's is_causal aligns at the start.
            attn_mask=causal_lower_right(len(q), len(k)) if causal else None,
            scale=scale,
        )
        contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts)
