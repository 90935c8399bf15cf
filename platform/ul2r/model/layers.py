"""What Megatron-Core's own layer cannot be configured to: other norms, parallel blocks, scaled logits."""

from __future__ import annotations

from collections.abc import Sequence
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

from ul2r.config import Architecture, AttentionBackend
from ul2r.model.attention import make_core_attention
from ul2r.model.experts import set_router
from ul2r.model.norm import Norm, ScaleOnlyNorm
from ul2r.model.rotary import compute_frequencies, select_angles


def gelu_tanh(values: Tensor) -> Tensor:
    """GELU by the tanh formula (arXiv 1606.08415, section 2), as GPT-2 has it."""
    return functional.gelu(values, approximate="tanh")


ACTIVATIONS = {
    "swiglu": functional.silu,
    "geglu": gelu_tanh,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
}


class QKNormAcrossHeads(torch.nn.Module):
    """RMSNorm over all heads together (OLMo 2, arXiv 2501.00656, 2.1), of which each tensor rank has its own.

    Args:
        config: Megatron's.
        hidden_size: Width D of one head.
        eps: Added to the mean square.
        heads: Heads of all ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__()
        self.width, self.eps = heads * hidden_size, eps
        self.ranks = config.tensor_model_parallel_size
        own = torch.ones(self.width // self.ranks, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(own)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise (S, B, H, D), H this rank's heads."""
        wide = heads.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:  # summed over ranks, and so is its gradient
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
        """Megatron's description of the shard."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state


class QKNormAcrossHeadsAttention(SelfAttention):  # type: ignore[misc]  # Megatron has no types
    """Self-attention with a norm over all queries and one over all keys.

    Megatron's own settings for such norms take them for whole on every tensor rank, and would add up their gradients.
    """

    def __init__(self, config: TransformerConfig, **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(config=config, **given)
        width, eps = config.kv_channels, config.layernorm_epsilon
        self.q_layernorm = QKNormAcrossHeads(config, width, eps, config.num_attention_heads)
        self.k_layernorm = QKNormAcrossHeads(config, width, eps, config.num_query_groups)


class LocalOrGlobalAttention(SelfAttention):  # type: ignore[misc]  # as above
    """Self-attention with the rotary positions of layers that have a window, or of those that have none.

    Args:
        windows: Of each layer of the model.
        given: Of `SelfAttention`.
    """

    def __init__(self, windows: Sequence[int | None], **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(**given)
        self.is_local = windows[self.layer_number - 1] is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *,
        rotary_pos_emb: Tensor,
        **given: Any,  # noqa: ANN401  Megatron's
    ) -> tuple[Tensor, Tensor | None]:
        """What Megatron's attention takes and gives; the angles are those of both kinds of layers."""
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
        """What Megatron's layer takes and gives."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, **_of_attention(given))
        one_norm = isinstance(self.pre_mlp_layernorm, IdentityOp)
        changed = self.mlp(normed if one_norm else self.pre_mlp_layernorm(hidden_states))
        return hidden_states + _with_bias(attended) + _with_bias(changed), context


class PostNormLayer(TransformerLayer):  # type: ignore[misc]  # as above
    """x + norm(attention(x)), then x + norm(mlp(x)) (OLMo 2, arXiv 2501.00656, 2.1).

    Where there are norms before attention and MLP as well, it is a sandwich (arXiv 2105.13290, 2.4; Gemma 3).
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
        """What Megatron's layer takes and gives."""
        attended = self.self_attention(self.input_layernorm(hidden_states), **_of_attention(given))
        hidden_states = hidden_states + self.post_attention_layernorm(_with_bias(attended))
        changed = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + self.post_mlp_layernorm(_with_bias(changed)), context


def embedding_scale(architecture: Architecture, dtype: torch.dtype) -> float:
    """sqrt(hidden_size) as `dtype` has it: in bfloat16 that of 2560 is 50.5."""
    exact = architecture.hidden_size**0.5 if architecture.scale_embedding else 1.0
    return float(torch.tensor(exact, dtype=dtype))


class ScaledGPTModel(GPTModel):  # type: ignore[misc]  # as above
    """GPTModel with what its constructor has no argument for.

    Args:
        architecture: What the model is.
        given: Of `GPTModel`.
    """

    def __init__(self, architecture: Architecture, **given: Any) -> None:  # noqa: ANN401  Megatron's
        super().__init__(**given)
        self.logit_scale = architecture.logit_scale
        self.embedding_scale = embedding_scale(architecture, self.config.params_dtype)
        if architecture.position_embedding == "rope":
            self.rotary_pos_emb.inv_freq = compute_frequencies(architecture, self.rotary_pos_emb)

    def _preprocess(self, **given: Any) -> tuple[Any, ...]:  # noqa: ANN401  Megatron's
        """Scale the embeddings."""
        hidden_states, *rest = super()._preprocess(**given)
        if self.pre_process and self.embedding_scale != 1:
            hidden_states = hidden_states * self.embedding_scale
        return hidden_states, *rest

    def _postprocess(self, hidden_states: Tensor, **given: Any) -> Tensor:  # noqa: ANN401  Megatron's
        """Scale the hidden states and thereby the logits."""
        if self.post_process and self.logit_scale != 1:
            hidden_states = hidden_states * self.logit_scale
        output: Tensor = super()._postprocess(hidden_states=hidden_states, **given)
        return output


def uses_transformer_engine(architecture: Architecture) -> bool:
    """Whether layers are TransformerEngine's: on GPUs where it is installed, for blocks that it has."""
    has_block = (
        architecture.block == "sequential"
        and not any(architecture.layer_windows)
        and architecture.qk_norm != "full"
        and not _scale_only(architecture)
    )
    return has_block and torch.cuda.is_available() and HAVE_TE


def build_layer_spec(architecture: Architecture, attention: AttentionBackend) -> ModuleSpec:
    """A layer of TransformerEngine's or Megatron's modules, as far as there are some, with attention by intervals."""
    if uses_transformer_engine(architecture):
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.num_experts,
            moe_grouped_gemm=architecture.num_experts is not None,
            qk_layernorm=architecture.qk_norm == "head",
        )
    else:
        spec = _local_spec(architecture)
    core = make_core_attention(attention, architecture.layer_windows)
    spec.submodules.self_attention.submodules.core_attention = core
    if architecture.num_experts is not None:
        set_router(spec)
    return spec


def _local_spec(architecture: Architecture) -> ModuleSpec:
    by_head = architecture.qk_norm == "head"
    norm = _norm(architecture)
    spec = get_gpt_layer_local_spec(
        architecture.num_experts, normalization="RMSNorm", qk_layernorm=by_head
    )
    parts, self_attention = spec.submodules, spec.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if by_head:
        self_attention.q_layernorm = self_attention.k_layernorm = Norm
    if architecture.qk_norm == "full":
        parts.self_attention.module = QKNormAcrossHeadsAttention
    if any(architecture.layer_windows):
        parts.self_attention.module = LocalOrGlobalAttention
        parts.self_attention.params["windows"] = architecture.layer_windows
    if architecture.block in {"post_norm", "sandwich"}:
        spec.module, spec.params = PostNormLayer, {"norm": norm}
    elif architecture.block != "sequential":
        spec.module = ParallelLayer
    if architecture.block == "post_norm":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    if architecture.block == "parallel":
        parts.pre_mlp_layernorm = IdentityOp
    return spec


def final_norm_class(architecture: Architecture) -> type[Any]:
    """The norm behind the last layer."""
    return LayerNormImpl if uses_transformer_engine(architecture) else _norm(architecture)


def _norm(architecture: Architecture) -> type[Any]:
    return ScaleOnlyNorm if _scale_only(architecture) else Norm


def _scale_only(architecture: Architecture) -> bool:
    return architecture.norm == "layer" and not architecture.norm_bias


def _of_attention(given: dict[str, Any]) -> dict[str, Any]:
    names = ("attention_mask", "rotary_pos_emb", "attention_bias", "packed_seq_params")
    return {name: given.get(name) for name in names}


def _with_bias(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """Megatron's projections give their bias beside their output."""
    value, bias = output
    return value if bias is None else value + bias
