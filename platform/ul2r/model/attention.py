"""Attention by intervals: each query sees one contiguous run of keys [lo, hi)."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional


def interval_mask(lo: Tensor, hi: Tensor) -> Tensor:
    """The dense mask of a microbatch's intervals, made once and used by every layer.

    Args:
        lo: (B, S) int, first key each query sees.
        hi: (B, S) int, one past the last.

    Returns:
        (B, 1, S, S) bool, True where the query (third axis) sees the key (fourth axis).
    """
    key = torch.arange(lo.shape[1], device=lo.device)
    seen = (key >= lo[:, :, None]) & (key < hi[:, :, None])  # (B, S, S)
    return seen[:, None]


class IntervalAttention(DotProductAttention):  # type: ignore[misc]  # Megatron has no types
    """Core attention over an `interval_mask`, by torch's scaled dot product attention.

    It takes the place of Megatron's `DotProductAttention` in a layer spec and, unlike it, reads
    True in a mask as "sees". The mask is a tensor, so activation recomputation can keep it.
    """

    def forward(  # noqa: PLR0917  Megatron's signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (S, B, H, D) this rank's heads.
            key: (S, B, G, D) this rank's key/value heads, G dividing H.
            value: (S, B, G, D).
            attention_mask: (B, 1, S, S) bool from `interval_mask`.
            attn_mask_type: Ignored; the mask says it all.
            attention_bias: Must be None.
            packed_seq_params: Must be None; packed examples are intervals here.

        Returns:
            (S, B, H * D).
        """
        del attn_mask_type
        assert attention_bias is None
        assert packed_seq_params is None
        context = functional.scaled_dot_product_attention(  # (B, H, S, D)
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
