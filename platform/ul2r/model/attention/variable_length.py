"""Interval attention as two calls of a variable-length kernel: inputs over themselves, targets over both."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ul2r.model.attention.backend import Backend
from ul2r.model.attention.segments import Plan, Segments, plan_segments


class Kernel(Protocol):
    """Attention of segments of different lengths."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Let each segment's queries attend to its keys.

        Args:
            query: (Tq, H, D), the segments' queries one behind the other.
            key: (Tk, G, D), their keys likewise, G dividing H.
            value: (Tk, G, D).
            segments: Where each begins.
            causal: Whether a segment's last query sees all its keys and each before it one less, else all see all.
            scale: What scores are multiplied by before the softmax.

        Returns:
            (Tq, H, D).
        """


class VariableLength(Backend[Plan]):
    """Segments are gathered, attended to by a kernel, and put back in their places."""

    def __init__(self, kernel: Kernel) -> None:
        """Attend with `kernel`."""
        super().__init__()
        self._kernel = kernel

    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Plan:
        """The segments of the microbatch."""
        return plan_segments(kv_start.numpy(), kv_end.numpy(), device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Plan, scale: float
    ) -> Tensor:
        """Attend in a call for inputs and one for targets."""
        shape = query.shape
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))  # (S * B, ...)
        found = [
            self._kernel(
                query.index_select(0, segments.queries),
                key.index_select(0, segments.keys),
                value.index_select(0, segments.keys),
                segments,
                causal=causal,
                scale=scale,
            )
            for segments, causal in ((prepared.full, False), (prepared.causal, True))
            if segments.longest_query
        ]
        own = value.index_select(0, prepared.alone)
        found.append(own.repeat_interleave(shape[2] // value.shape[1], dim=1))
        return torch.cat(found).index_select(0, prepared.inverse).view(shape)


class TransformerEngineKernel:
    """TransformerEngine's variable-length (THD) attention: FlashAttention or cuDNN, as it finds fit.

    Has not been run yet: no machine with a GPU was at hand.
    """

    def __init__(self) -> None:
        self._modules: dict[tuple[bool, float], Any] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Attend, as `Kernel` says."""
        attention = self._modules.get((causal, scale))
        if attention is None:
            attention = self._modules[causal, scale] = _transformer_engine(
                query, key, causal=causal, scale=scale
            )
        context: Tensor = attention(
            query,
            key,
            value,
            cu_seqlens_q=segments.query_bounds,
            cu_seqlens_kv=segments.key_bounds,
            max_seqlen_q=_power_of_two(segments.longest_query),
            max_seqlen_kv=_power_of_two(segments.longest_key),
        )
        return context.view(query.shape)


def _power_of_two(length: int) -> int:
    """The least one from `length` on: cuDNN plans anew for each bound of the lengths, and so meets few of them."""
    return 1 << (length - 1).bit_length()


def _transformer_engine(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Any:  # noqa: ANN401  TransformerEngine is not there to be typed
    """TransformerEngine's module for such queries and keys; it has no weights."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=query.shape[1],
        kv_channels=query.shape[2],
        num_gqa_groups=key.shape[1],
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right" if causal else "padding",
        attention_type="cross",
        softmax_scale=scale,
    )
