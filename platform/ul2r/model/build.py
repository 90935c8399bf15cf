"""GPTModel of Megatron-Core from a recipe's architecture, with initial weights that know no layout."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from ul2r.config import Architecture, AttentionBackend, Parallel
from ul2r.model.attention import core_attention
from ul2r.model.sizing import padded_vocabulary

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def transformer_config(architecture: Architecture, parallel: Parallel) -> TransformerConfig:
    """Megatron's configuration: bf16 on CUDA, fp32 on a CPU; no dropout; losses summed over tokens."""
    on_cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=architecture.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        bf16=on_cuda,
        params_dtype=torch.bfloat16 if on_cuda else torch.float32,
        pipeline_dtype=torch.bfloat16 if on_cuda else torch.float32,
        use_cpu_initialization=not on_cuda,
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def layer_spec(attention: AttentionBackend) -> ModuleSpec:
    """A Llama layer of Megatron's own modules, with attention by intervals."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = core_attention(attention)
    return spec


def build_model(
    architecture: Architecture,
    parallel: Parallel,
    vocabulary_size: int,
    sequence_length: int,
    seed: int,
    *,
    attention: AttentionBackend,
) -> GPTModel:
    """This rank's part of the model, with initial weights.

    Args:
        architecture: Sizes.
        parallel: Layout; Megatron's parallel state must have been set up with it.
        vocabulary_size: Entries of the tokenizer.
        sequence_length: Longest row.
        seed: The weights are a function of it and of each parameter's name, whatever the layout.
        attention: What computes attention.

    Raises:
        RecipeError: If what computes attention is not installed.
    """
    model = GPTModel(
        config=transformer_config(architecture, parallel),
        transformer_layer_spec=layer_spec(attention),
        vocab_size=padded_vocabulary(vocabulary_size),
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,
    )
    if torch.cuda.is_available():
        model.cuda()
    initialize(model, architecture, seed)
    return model


def sharding_metadata() -> dict[str, Any]:
    """What Megatron must know to describe shards: the optimizer's format survives any change of layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@torch.no_grad()
def initialize(model: GPTModel, architecture: Architecture, seed: int) -> None:
    """Fill the weights: N(0, init_std), residual outputs scaled by 1/sqrt(2 layers) (GPT-2); norms 1.

    Each shard is cut from the whole matrix, which is drawn from (seed, name), so that any tensor and
    pipeline layout starts from the same model.
    """
    state = model.sharded_state_dict(metadata=sharding_metadata())
    apply_factories(state)
    for shard in nested_values(state):
        if not isinstance(shard, ShardedTensor) or shard.data is None:
            continue
        if shard.data.dim() < 2:
            shard.data.fill_(1.0)
            continue
        std = architecture.init_std
        if shard.key.endswith(RESIDUAL_OUTPUTS):
            std /= (2 * architecture.layers) ** 0.5
        shard.data.copy_(_cut(_whole(shard, seed), shard) * std)


def _whole(shard: ShardedTensor, seed: int) -> torch.Tensor:
    """The unsharded standard normal matrix that the shard is a part of."""
    layer = shard.global_offset[: shard.prepend_axis_num]
    name = f"{seed}/{shard.key}/{layer}".encode()
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(name).digest()[:7], "little")
    )
    return torch.randn(shard.global_shape[shard.prepend_axis_num :], generator=generator)


def _cut(whole: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    offsets = shard.global_offset[shard.prepend_axis_num :]
    for axis, (offset, length) in enumerate(zip(offsets, shard.local_shape, strict=True)):
        whole = whole.narrow(axis, offset, length)
    return whole
