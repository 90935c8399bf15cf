"""GPTModel of Megatron-Core from a recipe's architecture, with initial weights that know no layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from ul2r.config import Architecture, Parallel, Precision, Recipe, Recompute
from ul2r.errors import LayoutError
from ul2r.model.attention import IntervalAttention
from ul2r.model.loss import GPTModelWithLogZ
from ul2r.model.norm import Norm
from ul2r.model.sizing import padded_vocabulary

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
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


def transformer_config(
    architecture: Architecture,
    parallel: Parallel,
    *,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
) -> TransformerConfig:
    """Megatron's configuration: no dropout; losses summed over tokens."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    interleaved = parallel.virtual_stages > 1
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
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
        sequence_parallel=parallel.sequence_parallel,
        # Two ranks that are each other's next and previous one must not mix up what they send: one by one, then.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp8="hybrid" if precision == "fp8" else None,
        fp8_recipe="tensorwise",  # scales of the moment: no history that a checkpoint would have to keep
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **RECOMPUTE[recompute],
    )


def uses_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: on GPUs where it is installed."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def check_precision(recipe: Recipe) -> None:
    """Refuse a precision that this worker's device does not have.

    Raises:
        LayoutError: If it has not.
    """
    chosen = f"training.precision={recipe.training.precision}"
    if recipe.precision != "fp32" and not torch.cuda.is_available():
        raise LayoutError(
            f"{chosen} on launch.gpus_per_worker={recipe.launch.gpus_per_worker}, but this worker has no GPU: "
            "set the second to 0, and the first to auto or fp32"
        )
    if recipe.precision != "fp8":
        return
    if not uses_transformer_engine():
        raise LayoutError(
            f"{chosen} needs TransformerEngine, which is not installed: set it to bf16 or install ul2r[gpu]"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise LayoutError(
            f"{chosen} needs a GPU of compute capability 8.9 or more (Ada, Hopper), this is "
            f"{'.'.join(map(str, capability))}: set it to bf16"
        )


def layer_spec() -> ModuleSpec:
    """A Llama layer of TransformerEngine's modules or Megatron's own, with attention by intervals."""
    if uses_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    spec.submodules.self_attention.submodules.core_attention = IntervalAttention
    return spec


def build_model(recipe: Recipe, vocabulary_size: int) -> list[GPTModel]:
    """This rank's part of the model, with initial weights: a chunk for each virtual stage.

    The weights are a function of the recipe's seed and of each parameter's name, whatever the layout; Megatron's
    parallel state must have been set up with that.

    Args:
        recipe: Architecture, layout, row length and seed.
        vocabulary_size: Entries of the tokenizer.

    Returns:
        The chunks in the order of their layers; Megatron-Core's schedules take turns among them.

    Raises:
        LayoutError: If this worker's device has not the recipe's precision.
    """
    check_precision(recipe)
    config = transformer_config(
        recipe.model,
        recipe.parallel,
        precision=recipe.precision,
        recompute=recipe.training.recompute,
    )
    chunks = [
        _build_chunk(recipe, config, vocabulary_size, stage)
        for stage in range(recipe.parallel.virtual_stages)
    ]
    for chunk in chunks:
        if torch.cuda.is_available():
            chunk.cuda()
        initialize(chunk, recipe.model, recipe.seed)
    return chunks


def _build_chunk(
    recipe: Recipe, config: TransformerConfig, vocabulary_size: int, stage: int
) -> GPTModel:
    """The layers of virtual stage `stage`, from 0, with the embedding or the output where they belong."""
    vp_stage = stage if recipe.parallel.virtual_stages > 1 else None
    layers = [layer_spec()] * get_num_layers_to_build(config, vp_stage)
    norm = LayerNormImpl if uses_transformer_engine() else Norm
    model = GPTModelWithLogZ if recipe.optimizer.z_loss else GPTModel
    return model(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
        vocab_size=padded_vocabulary(vocabulary_size),
        max_sequence_length=recipe.objective.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=recipe.model.rope_base,
        vp_stage=vp_stage,
    )


def sharded_model(chunks: list[GPTModel]) -> dict[str, Any]:
    """Where the shards of this rank's weights belong in the whole model, by chunk and parameter.

    Their names are those of the whole model, under any layout and either kind of layer. TransformerEngine's
    `_extra_state` is left out: the scales of fp8 are those of the moment.
    """
    metadata = sharding_metadata()
    return {
        f"chunk_{number}": {
            name: shard
            for name, shard in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.endswith("_extra_state")
        }
        for number, chunk in enumerate(chunks)
    }


def load_model(chunks: list[GPTModel], loaded: Mapping[str, Any]) -> None:
    """Take weights that a checkpoint's shards were read into, in the form of `sharded_model`."""
    for number, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"chunk_{number}"], strict=False)
        assert not unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing


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
