"""Interval attention by other means: the definition in float64, and each segment for itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from ul2r.model.attention.segments import Segments


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor
) -> Tensor:
    """Softmax attention written out in float64, through which gradients flow.

    Args:
        query: (S, B, H, D).
        key: (S, B, G, D), G dividing H.
        value: (S, B, G, D).
        kv_start: (B, S) int, first key each query sees.
        kv_end: (B, S) int, one past the last.

    Returns:
        float64 (S, B, H, D).
    """
    shared = query.shape[2] // key.shape[2]
    key, value = (part.double().repeat_interleave(shared, dim=2) for part in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), key) / query.shape[-1] ** 0.5
    place = torch.arange(key.shape[0], device=key.device)
    hidden = (place < kv_start[..., None]) | (place >= kv_end[..., None])  # (B, S, S)
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value)


def attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float
) -> Tensor:
    """A `Kernel` for variable-length attention that calls torch's own for each segment; runs on any device."""
    sizes = [bounds.diff().tolist() for bounds in (segments.query_bounds, segments.key_bounds)]
    shared = query.shape[1] // key.shape[1]
    found = []
    for q, k, v in zip(
        torch.split(query, sizes[0]),
        torch.split(key.repeat_interleave(shared, dim=1), sizes[1]),
        torch.split(value.repeat_interleave(shared, dim=1), sizes[1]),
        strict=True,
    ):
        context = functional.scaled_dot_product_attention(  # (1, H, queries, D)
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=causal_lower_right(len(q), len(k)) if causal else None,
            scale=scale,
        )
        found.append(context[0].transpose(0, 1))
    return torch.cat(found)
