"""Layers that Megatron-Core's settings do not cover: other norms, parallel blocks, scaled embeddings and logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from ul2r.config import Architecture
from ul2r.model.attention.core import IntervalAttention
from ul2r.model.experts import set_router
from ul2r.model.norm import Norm, ScaleOnlyNorm
from ul2r.model.output_positions import gather_no_input, select_positions
from ul2r.model.rotary import compute_frequencies, select_angles


def gelu_tanh(values: Tensor) -> Tensor:
    """Apply GELU by the tanh formula (arXiv 1606.08415, section 2), as in GPT-2."""
    return functional.gelu(values, approximate="tanh")


ACTIVATIONS = {
    "swiglu": functional.silu,
    "geglu": gelu_tanh,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
}


class QKNormAcrossHeads(torch.nn.Module):
    """RMSNorm over all heads together (OLMo 2, arXiv 2501.00656, 2.1), sharded by heads over tensor ranks.

    Args:
        config: Megatron's.
        hidden_size: Width D of one head.
        eps: Added to the mean square.
        num_heads: Heads of all ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int
    ) -> None:
        super().__init__()
        self.width = num_heads * hidden_size
        self.eps = eps
        self.num_ranks = config.tensor_model_parallel_size
        own = torch.ones(self.width // self.num_ranks, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(own)
        # Otherwise the gradient norm counts the weight on the first tensor rank only, as a copy.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalize (S, B, H, D), H this rank's heads."""
        wide = heads.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.num_ranks > 1:
            # `reduce` sums over ranks in the forward pass, `copy` sums the gradients in the backward pass: each rank's
            # output depends on all ranks' squares.
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares)
            )
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.type_as(heads)).view_as(heads)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,  # noqa: ARG002  Megatron's signature
    ) -> dict[str, Any]:
        """Describe the shard to Megatron: axis 0 is sharded over tensor ranks."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state


class QKNormAcrossHeadsAttention(SelfAttention):  # type: ignore[misc]  # Megatron has no types
    """Self-attention with one norm over all queries and one over all keys.

    Megatron's own settings for such norms take them for copies on every tensor rank and would sum their gradients.
    """

    def __init__(self, config: TransformerConfig, **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(config=config, **given)
        width = config.kv_channels
        eps = config.layernorm_epsilon
        # The spec leaves identities here; Megatron's forward pass calls whatever module it finds.
        self.q_layernorm = QKNormAcrossHeads(config, width, eps, config.num_attention_heads)
        self.k_layernorm = QKNormAcrossHeads(config, width, eps, config.num_query_groups)


class LocalOrGlobalAttention(SelfAttention):  # type: ignore[misc]  # as above
    """Self-attention with the rotary embeddings of local layers, which have a window, or of global ones.

    Args:
        layer_windows: Window of each layer of the model, None for a global layer.
        given: Arguments of `SelfAttention`.
    """

    def __init__(self, layer_windows: Sequence[int | None], **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(**given)
        # Megatron counts layers from 1, through all pipeline stages.
        self.is_local = layer_windows[self.layer_number - 1] is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *,
        rotary_pos_emb: Tensor,
        **given: Any,  # noqa: ANN401  Megatron's
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as Megatron's attention does; the angles contain those of both kinds of layers."""
        angles = select_angles(rotary_pos_emb, local=self.is_local)
        attended: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, rotary_pos_emb=angles, **given
        )
        return attended


class ParallelLayer(TransformerLayer):  # type: ignore[misc]  # as above
    """x + attention(norm(x)) + mlp(norm(x)), with one norm for both or one for each."""

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        **given: Any,  # noqa: ANN401  Megatron's
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer; arguments and result are those of Megatron's layer."""
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(normed, **_select_attention_arguments(given))
        has_one_norm = isinstance(self.pre_mlp_layernorm, IdentityOp)
        mlp = self.mlp(normed if has_one_norm else self.pre_mlp_layernorm(hidden_states))
        return hidden_states + _add_bias(attention) + _add_bias(mlp), context


class PostNormLayer(TransformerLayer):  # type: ignore[misc]  # as above
    """x + norm(attention(x)), then x + norm(mlp(x)) (OLMo 2, arXiv 2501.00656, 2.1).

    With norms before attention and MLP as well, it is a sandwich (arXiv 2105.13290, 2.4; Gemma 3).
    """

    def __init__(self, norm: type[torch.nn.Module], **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(**given)
        sizes = {"hidden_size": self.config.hidden_size, "eps": self.config.layernorm_epsilon}
        self.post_attention_layernorm = norm(config=self.config, **sizes)
        self.post_mlp_layernorm = norm(config=self.config, **sizes)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        **given: Any,  # noqa: ANN401  Megatron's
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer; arguments and result are those of Megatron's layer."""
        # Without norms before attention and MLP, input_layernorm and pre_mlp_layernorm are the identity.
        attention = self.self_attention(
            self.input_layernorm(hidden_states), **_select_attention_arguments(given)
        )
        hidden_states = hidden_states + self.post_attention_layernorm(_add_bias(attention))
        mlp = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + self.post_mlp_layernorm(_add_bias(mlp)), context


def compute_embedding_scale(architecture: Architecture, dtype: torch.dtype) -> float:
    """Return sqrt(hidden_size) rounded to `dtype`: in bfloat16 that of 2560 is 50.5."""
    exact = architecture.hidden_size**0.5 if architecture.scale_embedding else 1.0
    # On the CPU: models are also built on the meta device, which holds no values.
    return float(torch.tensor(exact, dtype=dtype, device="cpu"))


class ScaledGPTModel(GPTModel):  # type: ignore[misc]  # as above
    """GPTModel with scaled embeddings and logits, any rotary frequencies, and logits at chosen positions.

    Megatron's constructor has no arguments for them, so private hooks of its forward pass are extended.

    Args:
        architecture: The model.
        given: Arguments of `GPTModel`.
    """

    def __init__(self, architecture: Architecture, **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(**given)
        self.logit_scale = architecture.logit_scale
        self.embedding_scale = compute_embedding_scale(architecture, self.config.params_dtype)
        if architecture.position_embedding == "rope":
            # Megatron computes angles from this attribute on first use.
            self.rotary_pos_emb.inv_freq = compute_frequencies(architecture, self.rotary_pos_emb)
        self._output_index: Tensor | None = None

    def forward(
        self,
        *given: Any,  # noqa: ANN401  Megatron's
        output_index: Tensor | None = None,
        **named: Any,  # noqa: ANN401  Megatron's
    ) -> Tensor:
        """Compute this stage's output, as Megatron's model does.

        Args:
            given: Arguments of `GPTModel.forward`.
            output_index: Places in the flattened (S, B), int (N,), at which the last stage computes logits and losses;
                by default all.
            named: Arguments of `GPTModel.forward`.

        Returns:
            Hidden states, logits or losses; of `output_index`, logits (1, N, V / tensor ranks) or losses (1, N).
        """
        self._output_index = output_index
        output: Tensor = super().forward(*given, **named)
        return output

    def _preprocess(self, **given: Any) -> tuple[Any, ...]:  # noqa: ANN401  Megatron's
        """Scale the embeddings."""
        # GPTModel.forward calls both hooks with keyword arguments only.
        hidden_states, *rest = super()._preprocess(**given)
        if self.pre_process and self.embedding_scale != 1:
            hidden_states = hidden_states * self.embedding_scale
        return hidden_states, *rest

    def _postprocess(self, hidden_states: Tensor, **given: Any) -> Tensor:  # noqa: ANN401  Megatron's
        """Choose the positions, and scale the hidden states and thereby the logits."""
        index = self._output_index if self.post_process else None
        if index is not None:
            hidden_states, given["labels"] = select_positions(
                hidden_states, given["labels"], index, is_sharded=self.config.sequence_parallel
            )
        # Before the output matrix instead of after it: (c h) W = c (h W), and h is much smaller than the logits.
        if self.post_process and self.logit_scale != 1:
            hidden_states = hidden_states * self.logit_scale
        with nullcontext() if index is None else gather_no_input(self.output_layer):
            output: Tensor = super()._postprocess(hidden_states=hidden_states, **given)
        return output


def uses_transformer_engine(architecture: Architecture) -> bool:
    """Return whether layers are TransformerEngine's: on GPUs where it is installed, for blocks that it supports."""
    is_supported = (
        architecture.block == "sequential"
        and not any(architecture.layer_windows)
        and architecture.qk_norm != "full"
        and not _has_scale_only_norm(architecture)
    )
    return is_supported and torch.cuda.is_available() and HAVE_TE


def build_layer_spec(architecture: Architecture, attention: type[IntervalAttention]) -> ModuleSpec:
    """Return the spec of a layer with interval attention, of TransformerEngine's or of Megatron's modules."""
    if uses_transformer_engine(architecture):
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.num_experts,
            moe_grouped_gemm=architecture.num_experts is not None,
            qk_layernorm=architecture.qk_norm == "head",
        )
    else:
        spec = _build_local_spec(architecture)

    # In place of the spec's own core attention, which does not take intervals as its mask.
    spec.submodules.self_attention.submodules.core_attention = attention
    if architecture.num_experts is not None:
        set_router(spec)
    return spec


def _build_local_spec(architecture: Architecture) -> ModuleSpec:
    """Return Megatron's local layer with its norms, attention and block replaced as the architecture needs."""
    has_head_norms = architecture.qk_norm == "head"
    norm = _norm_class(architecture)

    # The norms that this call puts in place are all replaced below: the normalization is any that it accepts.
    spec = get_gpt_layer_local_spec(
        architecture.num_experts, normalization="RMSNorm", qk_layernorm=has_head_norms
    )
    parts = spec.submodules
    parts.input_layernorm = norm
    parts.pre_mlp_layernorm = norm
    if has_head_norms:
        parts.self_attention.submodules.q_layernorm = Norm
        parts.self_attention.submodules.k_layernorm = Norm

    if architecture.qk_norm == "full":
        parts.self_attention.module = QKNormAcrossHeadsAttention
    if any(architecture.layer_windows):
        parts.self_attention.module = LocalOrGlobalAttention
        parts.self_attention.params["layer_windows"] = architecture.layer_windows

    if architecture.block in {"post_norm", "sandwich"}:
        spec.module = PostNormLayer
        spec.params = {"norm": norm}
    elif architecture.block != "sequential":
        spec.module = ParallelLayer
    if architecture.block == "post_norm":
        parts.input_layernorm = IdentityOp
    if architecture.block in {"post_norm", "parallel"}:
        parts.pre_mlp_layernorm = IdentityOp
    return spec


def final_norm_class(architecture: Architecture) -> type[Any]:
    """Return the class of the norm after the last layer."""
    return LayerNormImpl if uses_transformer_engine(architecture) else _norm_class(architecture)


def _norm_class(architecture: Architecture) -> type[Any]:
    return ScaleOnlyNorm if _has_scale_only_norm(architecture) else Norm


def _has_scale_only_norm(architecture: Architecture) -> bool:
    return architecture.norm == "layer" and not architecture.norm_bias


def _select_attention_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of a layer that its attention takes."""
    names = ("attention_mask", "rotary_pos_emb", "attention_bias", "packed_seq_params")
    return {name: given.get(name) for name in names}


def _add_bias(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """Add the bias that Megatron's projections return separately from their output, for fusion with dropout."""
    value, bias = output
    return value if bias is None else value + bias
