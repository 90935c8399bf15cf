"""Size of a run, from its recipe alone: parameters and memory of each rank, pipeline bubble, time.

Pure arithmetic on how `model/build.py` and `train/` configure Megatron-Core; nothing is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ul2r.config import Architecture, Parallel, Recipe
from ul2r.errors import RecipeError
from ul2r.model.activation_memory import (
    chunk_bytes,
    element_bytes,
    interval_bytes,
    layer_bytes,
    logit_bytes,
    output_bytes,
    rotary_bytes,
)
from ul2r.model.flops import num_parameters
from ul2r.model.tensors import (
    EMBEDDING,
    Shape,
    is_sharded,
    layer_tensor_shapes,
    num_elements,
    outer_tensor_shapes,
)

GIB = 2**30
VOCABULARY_MULTIPLE = 128
"""The embedding is padded to a multiple of this, so that its shape is the same for every tensor-parallel size."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank by kind.

    Logits are those of the most targets that a microbatch of the mixture can have, or of validation, where they are at
    all positions, as far as these do not fit in the place of the activations, which validation does not keep.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum over all kinds."""
        return sum(self.by_kind.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by name of the kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StageEstimate:
    """Share of one pipeline stage, the same on each of its tensor ranks.

    Attributes:
        num_layers: Layers of the stage.
        num_parameters: Parameters of one rank; the padded embedding is on the first stage and, as output projection, on
            the last.
        num_live_microbatches: Microbatches whose activations are kept at the same time; one that only some of the
            chunks keep counts as a fraction.
        memory: Bytes of one rank.
    """

    num_layers: int
    num_parameters: int
    num_live_microbatches: float
    memory: MemoryEstimate


@dataclass(frozen=True)
class RunEstimate:
    """Size of a run.

    Attributes:
        num_parameters: Parameters of the model, a tied embedding counted once and unpadded.
        stages: Pipeline stages in order.
        bubble_fraction: Fraction of a step in which a stage waits for another.
    """

    num_parameters: int
    stages: tuple[StageEstimate, ...]
    bubble_fraction: float


def pad_vocabulary(size: int) -> int:
    """Return the rows of the embedding for a vocabulary of `size` entries."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def estimate_run(recipe: Recipe, vocabulary_size: int) -> RunEstimate:
    """Estimate the size of a run.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.

    Raises:
        RecipeError: If `parallel.tensor` does not divide the embedding's rows.
    """
    parallel = recipe.parallel
    num_embeddings = pad_vocabulary(recipe.model.num_used_embeddings(vocabulary_size))
    if num_embeddings % parallel.tensor:
        raise RecipeError(
            f"parallel.tensor={parallel.tensor} does not divide the embedding's {num_embeddings} rows "
            f"({vocabulary_size} tokens, padded to {VOCABULARY_MULTIPLE}): set parallel.tensor to a power of two"
        )

    return RunEstimate(
        num_parameters=num_parameters(recipe.model, vocabulary_size),
        stages=tuple(
            _estimate_stage(recipe, num_embeddings, stage) for stage in range(parallel.pipeline)
        ),
        bubble_fraction=pipeline_bubble(
            parallel.pipeline, recipe.num_microbatches, parallel.virtual_stages
        ),
    )


def check_memory(recipe: Recipe, vocabulary_size: int) -> None:
    """Refuse a run whose ranks need more memory than `launch.device_memory_gib`.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.

    Raises:
        RecipeError: If a rank does not fit, or as `estimate_run` does.
    """
    estimate = estimate_run(recipe, vocabulary_size)
    available = recipe.launch.memory_gib
    stage, memory = max(
        enumerate(stage.memory for stage in estimate.stages), key=lambda pair: pair[1].total
    )
    if available is None or memory.total <= available * GIB:
        return

    kinds = ", ".join(f"{kind} {count / GIB:.2f}" for kind, count in memory.by_kind.items())
    # What does not depend on the batch: only more ranks to shard it over help.
    if memory.weights + memory.gradients + memory.optimizer > available * GIB:
        remedy = "raise parallel.tensor, parallel.pipeline or parallel.num_workers"
    else:
        # More pipeline stages would not help: each keeps more microbatches, of fewer layers.
        recompute = "" if recipe.training.recompute == "full" else "set training.recompute=full, "
        remedy = (
            f"{recompute}raise parallel.tensor, or lower "
            f"training.micro_batch_size={recipe.training.micro_batch_size} or "
            f"objective.sequence_length={recipe.objective.sequence_length}"
        )
    raise RecipeError(
        f"a rank of pipeline stage {stage} needs {memory.total / GIB:.2f} GiB ({kinds}), "
        f"its device has launch.device_memory_gib={available:g}: {remedy}"
    )


def pipeline_bubble(stages: int, microbatches: int, virtual_stages: int = 1) -> float:
    """Return the fraction of a step that each of p stages idles under 1F1B with m microbatches, v chunks per stage.

    (p - 1) / (v m + p - 1). Narayanan et al. 2021, arXiv 2104.04473, 2.2.1 and 2.2.2, give it relative to the busy
    time: (p - 1) / (v m).
    """
    return (stages - 1) / (virtual_stages * microbatches + stages - 1)


def count_live_passes(parallel: Parallel, num_microbatches: int, stage: int) -> tuple[int, ...]:
    """Count, for each chunk of a stage, the forward passes whose activations are kept at the peak.

    The peak is reached when the pipeline is warm. Megatron-Core's interleaved schedule (arXiv 2104.04473, 2.2.2) lets
    groups of g microbatches pass through one chunk, then the next; stage s begins backward passes after
    2 (p - s - 1) + (v - 1) g forward ones, where 1F1B without chunks does so after p - s - 1.
    """
    num_stages = parallel.pipeline
    num_chunks = parallel.virtual_stages
    if num_chunks == 1:
        return (min(num_microbatches, num_stages - stage),)

    # With p = 4, v = 2, g = 4 and 8 microbatches, stage 0 keeps 2 * 3 + 4 + 1 = 11 passes: the schedule 0000 1111 0000
    # 1111 has 7 of chunk 0 and 4 of chunk 1 among its first 11.
    group_size = parallel.microbatch_group_size(num_microbatches)
    num_live = 2 * (num_stages - stage - 1) + (num_chunks - 1) * group_size + 1
    chunk_order = [
        chunk
        for first in range(0, num_microbatches, group_size)
        for chunk in range(num_chunks)
        for _ in range(first, min(first + group_size, num_microbatches))
    ]
    return tuple(chunk_order[:num_live].count(chunk) for chunk in range(num_chunks))


def estimate_seconds(recipe: Recipe, flops: float) -> float | None:
    """Return the expected seconds of training, None if the device's peak is unknown.

    MFU (PaLM, arXiv 2204.02311, appendix B) is assumed and covers pipeline bubbles and communication; data,
    checkpoints and held-out losses come on top.

    Args:
        recipe: The run.
        flops: Training FLOPs.
    """
    peak = recipe.launch.peak_tflops
    if peak is None:
        return None
    return flops / (recipe.parallel.num_workers * peak * 1e12 * recipe.launch.assumed_mfu)


def _estimate_stage(recipe: Recipe, num_embeddings: int, stage: int) -> StageEstimate:
    """Estimate a pipeline stage, counted from 0, of a model with a padded embedding of `num_embeddings` rows."""
    parallel = recipe.parallel
    is_last = stage == parallel.pipeline - 1
    layers = parallel.layers_per_chunk(recipe.model.num_layers)[stage]
    weights = _count_stage_parameters(
        recipe, num_embeddings, sum(layers), is_first=stage == 0, is_last=is_last
    )
    logits = logit_bytes(recipe, num_embeddings, is_training=True) if is_last else 0

    live = count_live_passes(parallel, recipe.num_microbatches, stage)
    kept = sum(
        count * chunk_bytes(recipe, layers[chunk], is_last=is_last and chunk == len(live) - 1)
        for chunk, count in enumerate(live)
    )
    recomputed = layer_bytes(recipe).recomputed
    if is_last:
        # Logits and the final norm's tensors have been freed when the first layer is recomputed.
        recomputed -= logits + output_bytes(recipe, is_last=True)
    activations = kept + max(recomputed, 0)
    if is_last:
        validation = logit_bytes(recipe, num_embeddings, is_training=False)
        logits = max(logits, validation - activations)

    element = element_bytes(recipe)
    main_weights = 4 if element < 4 else 0  # the optimizer's fp32 copy of bf16 weights
    return StageEstimate(
        num_layers=sum(layers),
        num_parameters=weights,
        num_live_microbatches=sum(live) / len(live),
        memory=MemoryEstimate(
            weights=element * weights,
            # DDP's gradient buffers are fp32 whatever the weights are (`grad_reduce_in_fp32` in `train/step.py`).
            gradients=4 * weights,
            # The distributed optimizer shards its fp32 states over data-parallel ranks: weights, Adam's two moments.
            optimizer=(main_weights + 4 + 4) * -(-weights // parallel.data),
            activations=activations + rotary_bytes(recipe) + interval_bytes(recipe),
            logits=logits,
        ),
    )


def _count_stage_parameters(
    recipe: Recipe, num_embeddings: int, num_layers: int, *, is_first: bool, is_last: bool
) -> int:
    """Count the parameters of one rank: matrices are sharded over tensor ranks, norms are not."""
    model = recipe.model
    parallel = recipe.parallel
    outer = outer_tensor_shapes(model, num_embeddings)
    first = {name: shape for name, shape in outer.items() if name.startswith("embedding.")}
    last = {name: shape for name, shape in outer.items() if name not in first}
    if model.tie_embeddings and parallel.pipeline > 1:
        last[EMBEDDING] = outer[EMBEDDING]  # the last stage holds its own copy

    return (
        num_layers * _count_per_rank(model, layer_tensor_shapes(model), parallel.tensor)
        + is_first * _count_per_rank(model, first, parallel.tensor)
        + is_last * _count_per_rank(model, last, parallel.tensor)
    )


def _count_per_rank(model: Architecture, tensors: dict[str, Shape], num_tensor_ranks: int) -> int:
    """Count the elements that one tensor rank holds."""
    sharded = {name: shape for name, shape in tensors.items() if is_sharded(model, name)}
    whole = num_elements(tensors) - num_elements(sharded)
    return whole + num_elements(sharded) // num_tensor_ranks
