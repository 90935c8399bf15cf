"""Interval attention as two calls of a variable-length kernel: inputs over inputs, targets over both."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ul2r.model.attention.backend import Backend
from ul2r.model.attention.segments import Plan, Segments, plan_segments


class Kernel(Protocol):
    """Attention over segments of different lengths."""

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
            query: (Tq, H, D), the segments' queries concatenated.
            key: (Tk, G, D), their keys likewise, G dividing H.
            value: (Tk, G, D).
            segments: Bounds of each segment.
            causal: If True, a segment's last query sees all its keys and each before it one less; else all see all.
            scale: Factor of the scores before the softmax.

        Returns:
            (Tq, H, D).
        """


class VariableLength(Backend[Plan]):
    """Backend that gathers segments, lets a kernel attend, and scatters the results back."""

    def __init__(self, kernel: Kernel) -> None:
        """Use `kernel` for attention."""
        super().__init__()
        self._kernel = kernel

    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Plan:
        """Plan the segments of the microbatch."""
        return plan_segments(kv_start.numpy(), kv_end.numpy(), device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Plan, scale: float
    ) -> Tensor:
        """Attend in one call for inputs and one for targets."""
        shape = query.shape
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))  # (S * B, ...)
        contexts = [
            self._kernel(
                query.index_select(0, segments.queries),
                key.index_select(0, segments.keys),
                value.index_select(0, segments.keys),
                segments,
                causal=causal,
                scale=scale,
            )
            for segments, causal in ((prepared.full, False), (prepared.causal, True))
            if segments.max_queries
        ]

        # A query that sees only itself attends to its own value with weight 1.
        own = value.index_select(0, prepared.isolated)
        contexts.append(own.repeat_interleave(shape[2] // value.shape[1], dim=1))
        return torch.cat(contexts).index_select(0, prepared.inverse).view(shape)


class TransformerEngineKernel:
    """TransformerEngine's variable-length (THD) attention: FlashAttention or cuDNN, at its choice.

    Not run yet: no machine with a GPU and TransformerEngine was available.
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
        """Attend; see `Kernel`."""
        # One module for all layers: it has no weights, and its mask type and scale are fixed when it is constructed.
        attention = self._modules.get((causal, scale))
        if attention is None:
            attention = _make_module(query, key, causal=causal, scale=scale)
            self._modules[causal, scale] = attention
        context: Tensor = attention(
            query,
            key,
            value,
            cu_seqlens_q=segments.query_bounds,
            cu_seqlens_kv=segments.key_bounds,
            max_seqlen_q=_round_up_to_power_of_two(segments.max_queries),
            max_seqlen_kv=_round_up_to_power_of_two(segments.max_keys),
        )
        return context.view(query.shape)


def _round_up_to_power_of_two(length: int) -> int:
    """Return the least power of two >= `length`: cuDNN makes a new plan for each bound, so there should be few."""
    return 1 << (length - 1).bit_length()


def _make_module(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Any:  # noqa: ANN401  TransformerEngine is not installed here
    """Make TransformerEngine's module for queries and keys of these shapes; it has no weights."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=query.shape[1],
        kv_channels=query.shape[2],
        num_gqa_groups=key.shape[1],
        attention_dropout=0.0,
        qkv_format="thd",
        # Bottom right: a segment's last query sees all of its keys, of which there are more than queries.
        attn_mask_type="padding_causal_bottom_right" if causal else "padding",
        attention_type="cross",
        softmax_scale=scale,
    )
