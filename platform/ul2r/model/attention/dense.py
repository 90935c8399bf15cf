"""Torch's scaled dot product attention with a dense mask: the backend on CPUs, and the reference for the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ul2r.model.attention.backend import Backend


def make_interval_mask(kv_start: Tensor, kv_end: Tensor) -> Tensor:
    """Make the dense mask of a microbatch's intervals.

    Args:
        kv_start: (B, S) int, first key each query sees.
        kv_end: (B, S) int, one past the last.

    Returns:
        (B, 1, S, S) bool, True where the query (third axis) sees the key (fourth axis).
    """
    key = torch.arange(kv_start.shape[1], device=kv_start.device)
    is_visible = (key >= kv_start[:, :, None]) & (key < kv_end[:, :, None])  # (B, S, S)
    return is_visible[:, None]


class DenseMask(Backend[Tensor]):
    """Backend that computes every pair of query and key and masks the invisible ones."""

    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Tensor:
        """Make the mask, bool (B, 1, S, S)."""
        start, end = (bound.to(device, non_blocking=True) for bound in (kv_start, kv_end))
        return make_interval_mask(start, end)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Tensor, scale: float
    ) -> Tensor:
        """Attend under the mask."""
        context = functional.scaled_dot_product_attention(  # (B, H, S, D)
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=prepared,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3)
