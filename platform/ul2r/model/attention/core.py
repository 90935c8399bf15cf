"""Interval attention in place of Megatron's core attention."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from ul2r.config import AttentionBackend
from ul2r.errors import RecipeError
from ul2r.model.attention.backend import Backend
from ul2r.model.attention.dense import DenseMask
from ul2r.model.attention.variable_length import TransformerEngineKernel, VariableLength


class IntervalAttention(DotProductAttention):  # type: ignore[misc]  # Megatron has no types
    """Core attention of a layer: its mask is the microbatch's packed intervals, and its backend computes it."""

    backend: ClassVar[Backend[Any]]
    layer_windows: ClassVar[Sequence[int | None]] = ()
    """Window of each layer of the model, None for a layer without one."""

    def forward(  # noqa: PLR0917  Megatron's signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (S, B, H, D) this rank's heads.
            key: (S, B, G, D) this rank's key/value heads, G dividing H.
            value: (S, B, G, D).
            attention_mask: int32 (B, 2, S) from `pack_intervals`.
            attn_mask_type: Ignored; the intervals define the mask.
            attention_bias: Must be None.
            packed_seq_params: Must be None; packed examples are intervals here.

        Returns:
            (S, B, H * D).
        """
        del attn_mask_type

        # Megatron passes whatever it was given as the mask: the shape shows that it is packed intervals.
        assert attention_bias is None
        assert packed_seq_params is None
        assert attention_mask.shape == (query.shape[1], 2, query.shape[0]), "no intervals"
        window = self.layer_windows[self.layer_number - 1]  # Megatron counts layers from 1
        context = self.backend(query, key, value, attention_mask, self.softmax_scale, window=window)
        # Megatron's output projection follows, which takes all heads of a position as one vector.
        return context.flatten(2)


def make_core_attention(
    name: AttentionBackend, layer_windows: Sequence[int | None], num_live_microbatches: int = 1
) -> type[IntervalAttention]:
    """Make a class of `IntervalAttention` whose backend is shared by the layers of one model.

    Args:
        name: The backend.
        layer_windows: Window of each layer of the model, None for a layer that sees all of its interval.
        num_live_microbatches: Microbatches that the model works on at a time.

    Raises:
        RecipeError: If a package that the backend needs is not installed.
    """
    # Megatron instantiates a class per layer with arguments of its own, so what layers share is on the class.
    backend = _make_backend(name)
    backend.num_kept = num_live_microbatches
    shared = {"backend": backend, "layer_windows": layer_windows}
    return type("IntervalAttention", (IntervalAttention,), shared)


def _make_backend(name: AttentionBackend) -> Backend[Any]:
    if name == "sdpa":
        return DenseMask()
    if name == "flex":
        from ul2r.model.attention.flex import Flex  # takes seconds to import

        return Flex()
    if find_spec("transformer_engine") is None:
        raise RecipeError(
            "attention=te needs TransformerEngine, which is not installed on the workers: install ul2r[gpu] there, or "
            "set attention to auto, flex or sdpa"
        )
    return VariableLength(TransformerEngineKernel())


def needs_host_intervals(name: AttentionBackend) -> bool:
    """Return whether a backend must have intervals in host memory: to count segments without waiting for the device."""
    return name == "te"
