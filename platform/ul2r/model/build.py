"""GPTModel of Megatron-Core from a recipe's architecture, with initial weights that know no layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from ul2r.config import Architecture, Parallel
from ul2r.model.layers import ACTIVATIONS, Decoder, layer_spec
from ul2r.model.sizing import padded_vocabulary
from ul2r.model.tensors import EMBEDDING

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
        kv_channels=architecture.head_dim,
        normalization={"rms": "RMSNorm", "layer": "LayerNorm"}[architecture.norm],
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.query_key_norm == "head",
        gated_linear_unit=architecture.activation == "swiglu",
        activation_func=ACTIVATIONS[architecture.activation],
        add_bias_linear=architecture.bias == "all",
        add_qkv_bias=architecture.bias is not None,
        rotary_interleaved=architecture.rope_interleaved,
        perform_initialization=False,  # weights are drawn here, or loaded: see `initialize`
        hidden_dropout=0.0,
        attention_dropout=0.0,
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


def build_model(
    architecture: Architecture,
    parallel: Parallel,
    vocabulary_size: int,
    sequence_length: int,
    seed: int | None,
) -> GPTModel:
    """This rank's part of the model, with initial weights.

    Args:
        architecture: Sizes.
        parallel: Layout; Megatron's parallel state must have been set up with it.
        vocabulary_size: Entries of the tokenizer.
        sequence_length: Longest row.
        seed: The weights are a function of it and of each parameter's name, whatever the layout; None leaves
            them undefined, for weights that are loaded next.
    """
    model = Decoder(
        architecture,
        config=transformer_config(architecture, parallel),
        transformer_layer_spec=layer_spec(architecture),
        vocab_size=padded_vocabulary(architecture.rows(vocabulary_size)),
        max_sequence_length=architecture.positions or sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type={"rope": "rope", "learned": "learned_absolute"}[
            architecture.position_embedding
        ],
        rotary_percent=architecture.rope_share,
        rotary_base=architecture.rope_base,
    )
    _mark_shards(model)
    if torch.cuda.is_available():
        model.cuda()
    if seed is not None:
        initialize(model, architecture, seed)
    return model


def _mark_shards(model: GPTModel) -> None:
    """Say which weights tensor ranks share out, as Megatron's own initialization would: the gradient norm asks."""
    axes = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        axis = axes.get(type(module))
        weight = getattr(module, "weight", None)  # a tied output layer has none
        if axis is not None and weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, axis, 1)


def sharding_metadata() -> dict[str, Any]:
    """What Megatron must know to describe shards: the optimizer's format survives any change of layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@torch.no_grad()
def initialize(model: GPTModel, architecture: Architecture, seed: int) -> None:
    """Fill the weights: N(0, init_std), residual outputs scaled by 1/sqrt(2 layers) (GPT-2); norms 1, biases 0.

    With init_std=fan_in (PaLM, arXiv 2204.02311, section 2) nothing is scaled. Each shard is cut from the whole
    matrix, which is drawn from (seed, name), so that any tensor and pipeline layout starts from the same model.
    """
    for shard in shards(model):
        if len(shard.global_shape) - shard.prepend_axis_num < 2:
            shard.data.fill_(0.0 if shard.key.endswith("bias") else 1.0)
        else:
            shard.data.copy_(_cut(_whole(shard, seed), shard) * _std(shard, architecture))


def shards(model: GPTModel) -> Iterator[ShardedTensor]:
    """This rank's part of each tensor: its name, where it lies in the whole, and its data, to be written to."""
    state = model.sharded_state_dict(metadata=sharding_metadata())
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and shard.data is not None:
            yield shard


def _std(shard: ShardedTensor, architecture: Architecture) -> float:
    if shard.key == EMBEDDING and architecture.embedding_std is not None:
        return architecture.embedding_std
    if architecture.init_std == "fan_in":
        return float(shard.global_shape[-1] ** -0.5)
    scaled = shard.key.endswith(RESIDUAL_OUTPUTS)
    return (
        architecture.init_std / (2 * architecture.layers) ** 0.5
        if scaled
        else architecture.init_std
    )


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
