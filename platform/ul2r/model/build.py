"""Megatron-Core's GPTModel for a recipe, with initial weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
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
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from ul2r.config import Architecture, Parallel, Precision, Recipe, Recompute
from ul2r.errors import LayoutError
from ul2r.model.attention import make_core_attention
from ul2r.model.attention.core import IntervalAttention
from ul2r.model.experts import make_expert_settings
from ul2r.model.kernels import KernelPlan
from ul2r.model.layers import (
    ACTIVATIONS,
    ScaledGPTModel,
    build_layer_spec,
    final_norm_class,
    uses_transformer_engine,
)
from ul2r.model.loss import LogZGPTModel
from ul2r.model.refusals import translate_refusals
from ul2r.model.rotary import install_compiled_rotation
from ul2r.model.sizing import pad_vocabulary
from ul2r.model.tensors import EMBEDDING

# Matrices whose output is added to the residual stream.
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""Megatron's settings for `training.recompute`."""


def make_transformer_config(
    architecture: Architecture,
    parallel: Parallel,
    *,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    moe_aux_loss_coeff: float = 0.0,
    kernels: KernelPlan = KernelPlan(),  # noqa: B008  frozen
) -> TransformerConfig:
    """Return Megatron's configuration: no dropout, losses summed over tokens."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    interleaved = parallel.virtual_stages > 1
    scalar = architecture.query_pre_attn_scalar
    has_experts = architecture.num_experts is not None

    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization={"rms": "RMSNorm", "layer": "LayerNorm"}[architecture.norm],
        layernorm_epsilon=architecture.norm_epsilon,
        layernorm_zero_centered_gamma=architecture.norm_zero_centered,
        qk_layernorm=architecture.qk_norm == "head",
        gated_linear_unit=architecture.is_gated,
        activation_func=ACTIVATIONS[architecture.activation],
        add_bias_linear=architecture.bias == "all",
        add_qkv_bias=architecture.bias is not None,
        softmax_scale=None if scalar is None else scalar**-0.5,
        rotary_interleaved=architecture.rope_interleaved,
        # Megatron's own initialization depends on the layout: weights are drawn by `initialize_weights`, or loaded.
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_and_loss,
        account_for_loss_in_pipeline_split=parallel.account_for_embedding_and_loss,
        sequence_parallel=parallel.sequence_parallel,
        # With two stages the next rank is also the previous one, and an interleaved schedule sends both ways at once:
        # batched sends could be received in the wrong order.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp8="hybrid" if precision == "fp8" else None,
        # Scales come from the current tensors: no history that a checkpoint would have to keep.
        fp8_recipe="tensorwise",
        use_cpu_initialization=not torch.cuda.is_available(),
        # Gradients are divided by the target tokens of the global batch, not per microbatch.
        calculate_per_token_loss=True,
        bias_activation_fusion=kernels.swiglu is not None,
        cross_entropy_loss_fusion=kernels.loss is not None,
        cross_entropy_fusion_impl="native",
        # These fused kernels need CUDA, Apex or TransformerEngine.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **RECOMPUTE[recompute],
        **(make_expert_settings(architecture, moe_aux_loss_coeff) if has_experts else {}),
    )
    # Not an argument: the constructor asks for TransformerEngine's version, also where another kernel takes its place.
    config.apply_rope_fusion = kernels.rope is not None
    if kernels.rope == "torch.compile":
        install_compiled_rotation()
    return config


def check_settings(architecture: Architecture) -> None:
    """Check that Megatron-Core accepts an architecture's settings, whatever the layout.

    Raises:
        LayoutError: If it does not.
    """
    with translate_refusals():
        make_transformer_config(architecture, Parallel())


def check_precision(recipe: Recipe) -> None:
    """Refuse a precision that this worker's device does not support.

    Raises:
        LayoutError: If it does not.
    """
    setting = f"training.precision={recipe.training.precision}"
    needs_gpu = recipe.precision != "fp32" and recipe.launch.gpus_per_worker > 0
    if needs_gpu and not torch.cuda.is_available():
        raise LayoutError(
            f"{setting} with launch.gpus_per_worker={recipe.launch.gpus_per_worker}, but this worker has no GPU: "
            "set launch.gpus_per_worker=0 and training.precision to auto, bf16 or fp32"
        )
    if recipe.precision != "fp8":
        return

    if not uses_transformer_engine(recipe.model):
        raise LayoutError(
            f"{setting} needs TransformerEngine, which is not installed or does not support this model's layers: "
            "set training.precision=bf16 or install ul2r[gpu]"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise LayoutError(
            f"{setting} needs a GPU of compute capability 8.9 or higher (Ada, Hopper), this one has "
            f"{'.'.join(map(str, capability))}: set training.precision=bf16"
        )


def build_model(
    recipe: Recipe,
    vocabulary_size: int,
    kernels: KernelPlan = KernelPlan(),  # noqa: B008  frozen
) -> list[GPTModel]:
    """Build this rank's part of the model: one chunk per virtual stage.

    Initial weights are a function of the recipe's seed and of each parameter's name, whatever the layout; if the
    recipe has a base, they are left uninitialized. Megatron's parallel state must have been set up with the layout.

    Args:
        recipe: Architecture, layout, row length and seed.
        vocabulary_size: Entries of the tokenizer.
        kernels: Fused kernels; by default none.

    Returns:
        The chunks in the order of their layers; Megatron-Core's schedules alternate between them.

    Raises:
        LayoutError: If this worker's device does not support the recipe's precision, or Megatron-Core refuses the
            model.
        RecipeError: If the attention backend is not installed.
    """
    check_precision(recipe)
    chunks = build_chunks(recipe, vocabulary_size, kernels)
    for chunk in chunks:
        # Megatron allocates its matrices on the GPU, but the norms are torch's own and still in host memory.
        if torch.cuda.is_available():
            chunk.cuda()
        if recipe.base is None:
            initialize_weights(chunk, recipe.model, recipe.seed)
    return chunks


def build_chunks(
    recipe: Recipe,
    vocabulary_size: int,
    kernels: KernelPlan = KernelPlan(),  # noqa: B008  frozen
) -> list[GPTModel]:
    """Build this rank's chunks as `build_model` does, but leave all weights uninitialized.

    Raises:
        LayoutError: If Megatron-Core refuses the model or the layout.
        RecipeError: If the attention backend is not installed.
    """
    with translate_refusals():
        config = make_transformer_config(
            recipe.model,
            recipe.parallel,
            precision=recipe.precision,
            recompute=recipe.training.recompute,
            moe_aux_loss_coeff=recipe.optimizer.moe_aux_loss_coeff,
            kernels=kernels,
        )
        # One for all chunks, which compute the same microbatches.
        attention = make_core_attention(
            recipe.attention_backend,
            recipe.model.layer_windows,
            recipe.parallel.num_live_microbatches(recipe.num_microbatches),
        )
        return [
            _build_chunk(recipe, config, vocabulary_size, stage, attention)
            for stage in range(recipe.parallel.virtual_stages)
        ]


def _build_chunk(
    recipe: Recipe,
    config: TransformerConfig,
    vocabulary_size: int,
    stage: int,
    attention: type[IntervalAttention],
) -> GPTModel:
    """Build the layers of virtual stage `stage`, from 0, with embedding and output projection where they belong."""
    architecture = recipe.model
    # Megatron takes None for a pipeline without virtual stages, and 0 for the first of several.
    vp_stage = stage if recipe.parallel.virtual_stages > 1 else None
    num_layers = get_num_layers_to_build(config, vp_stage)
    layers = TransformerBlockSubmodules(
        layer_specs=[build_layer_spec(architecture, attention)] * num_layers,
        layer_norm=final_norm_class(architecture),
    )

    model_class = LogZGPTModel if recipe.optimizer.z_loss else ScaledGPTModel
    model = model_class(
        architecture,
        config=config,
        transformer_layer_spec=layers,
        # Megatron-LM's scripts pad to a multiple that depends on the tensor-parallel size; a fixed one fits every
        # layout.
        vocab_size=pad_vocabulary(architecture.num_used_embeddings(vocabulary_size)),
        max_sequence_length=architecture.max_position_embeddings
        or recipe.objective.sequence_length,
        # Megatron's names for "has the embedding" and "has the output projection".
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,  # logits stay sharded over the vocabulary, as Megatron's loss expects
        share_embeddings_and_output_weights=architecture.tie_embeddings,
        position_embedding_type={"rope": "rope", "learned": "learned_absolute"}[
            architecture.position_embedding
        ],
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rope_theta,
        vp_stage=vp_stage,
    )
    _mark_sharded_weights(model)
    return model


def make_sharded_state_dict(chunks: list[GPTModel]) -> dict[str, Any]:
    """Describe the shards of this rank's weights, by chunk and parameter, for Megatron's checkpoints.

    Their keys are those of the whole model, under any layout and either kind of layer. TransformerEngine's
    `_extra_state` is left out: fp8 scales are computed from the current tensors.
    """
    metadata = make_sharding_metadata()
    return {
        f"chunk_{number}": {
            name: shard
            for name, shard in chunk.sharded_state_dict(metadata=metadata).items()
            if not _is_extra_state(name)
        }
        for number, chunk in enumerate(chunks)
    }


def load_model(chunks: list[GPTModel], loaded: Mapping[str, Any]) -> None:
    """Load weights that were read into the shards of `make_sharded_state_dict`."""
    for number, chunk in enumerate(chunks):
        # Not strict: TransformerEngine's modules expect an `_extra_state` each, which checkpoints do not hold.
        missing, unexpected = chunk.load_state_dict(loaded[f"chunk_{number}"], strict=False)
        assert not unexpected
        assert all(map(_is_extra_state, missing)), missing


def _is_extra_state(name: str) -> bool:
    """Return whether a tensor is TransformerEngine's own; for grouped experts a number follows the name."""
    return name.rpartition(".")[2].startswith("_extra_state")


def _mark_sharded_weights(model: GPTModel) -> None:
    """Mark weights that are sharded over tensor ranks, as Megatron's own initialization does.

    Without the mark, the gradient norm counts them on the first tensor rank only, as copies.
    """
    axes = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        axis = axes.get(type(module))
        weight = getattr(module, "weight", None)  # a tied output layer has none
        if axis is not None and weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, axis, 1)


def make_sharding_metadata() -> dict[str, Any]:
    """Return the metadata that Megatron needs to describe shards: the group of ranks with the same ones."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


@torch.no_grad()
def initialize_weights(model: GPTModel, architecture: Architecture, seed: int) -> None:
    """Fill weights from N(0, init_std), residual outputs scaled by 1/sqrt(2 num_layers) (GPT-2); norms 1, biases 0.

    Zero-centered norms are 0. With init_std=fan_in (PaLM, arXiv 2204.02311, section 2) nothing is scaled.

    Each shard is cut from the whole matrix, which is drawn from (seed, name), so that every tensor and pipeline layout
    starts from the same model.
    """
    for shard in iter_shards(model):
        # Vectors are norms and biases. Writing to `shard.data` writes to the parameter, which it shares memory with.
        if len(shard.global_shape) - shard.prepend_axis_num < 2:
            is_zero = architecture.norm_zero_centered or shard.key.endswith("bias")
            shard.data.fill_(0.0 if is_zero else 1.0)
        else:
            whole = _draw_matrix(shard, seed)
            shard.data.copy_(_cut_shard(whole, shard) * _get_std(shard, architecture))


def iter_shards(model: GPTModel) -> Iterator[ShardedTensor]:
    """Yield this rank's part of each tensor: key, offset in the whole, and its data, which may be written to."""
    state = model.sharded_state_dict(metadata=make_sharding_metadata())
    # Factories split a fused weight, as SwiGLU's, into the parts that are sharded each on their own.
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and shard.data is not None:
            yield shard


def _get_std(shard: ShardedTensor, architecture: Architecture) -> float:
    if shard.key == EMBEDDING and architecture.embedding_std is not None:
        return architecture.embedding_std
    if architecture.init_std == "fan_in":
        # Matrices are (outputs, inputs), so the last axis is the fan-in.
        return float(shard.global_shape[-1] ** -0.5)
    if shard.key.endswith(RESIDUAL_OUTPUTS):
        return float(architecture.init_std / (2 * architecture.num_layers) ** 0.5)
    return architecture.init_std


def _draw_matrix(shard: ShardedTensor, seed: int) -> torch.Tensor:
    """Draw the whole standard normal matrix that the shard is a part of."""
    # Layers, and experts, are leading axes of the whole tensor: their index is part of the name.
    index = shard.global_offset[: shard.prepend_axis_num]
    name = f"{seed}/{shard.key}/{index}".encode()
    # Not hash(), which is salted per process, and a CPU generator on GPUs too: every rank draws the same matrix.
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(name).digest()[:7], "little")
    )
    return torch.randn(shard.global_shape[shard.prepend_axis_num :], generator=generator)


def _cut_shard(whole: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    offsets = shard.global_offset[shard.prepend_axis_num :]
    for axis, (offset, length) in enumerate(zip(offsets, shard.local_shape, strict=True)):
        whole = whole.narrow(axis, offset, length)
    return whole
