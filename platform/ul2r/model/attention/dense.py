"""Torch's scaled dot product attention with a dense mask: a CPU's way, and the yardstick for the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ul2r.model.attention.backend import Backend


def interval_mask(lo: Tensor, hi: Tensor) -> Tensor:
    """The dense mask of a microbatch's intervals.

    Args:
        lo: (B, S) int, first key each query sees.
        hi: (B, S) int, one past the last.

    Returns:
        (B, 1, S, S) bool, True where the query (third axis) sees the key (fourth axis).
    """
    key = torch.arange(lo.shape[1], device=lo.device)
    seen = (key >= lo[:, :, None]) & (key < hi[:, :, None])  # (B, S, S)
    return seen[:, None]


class DenseMask(Backend[Tensor]):
    """Every pair of query and key is computed, and those out of sight are masked."""

    def prepare(self, lo: Tensor, hi: Tensor, device: torch.device) -> Tensor:
        """The mask, bool (B, 1, S, S)."""
        first, end = (bound.to(device, non_blocking=True) for bound in (lo, hi))
        return interval_mask(first, end)

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
