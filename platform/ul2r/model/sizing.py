"""What a run needs, from its recipe alone: parameters and memory of each rank, pipeline bubble, time.

Pure arithmetic over how `model/build.py` and `train/` set Megatron-Core up; nothing is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ul2r.config import Architecture, Parallel, Recipe
from ul2r.errors import RecipeError
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
"""The embedding is padded to this, so that its shape is one for every tensor-parallel size."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.by_kind.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by name of the kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage, as any of its tensor ranks has it."""

    layers: int
    num_parameters: int
    """Of one rank; the padded embedding is on the first stage and, as output projection, on the last."""
    microbatches: float
    """Microbatches whose activations are kept at the same time; one that only some chunks keep counts in part."""
    memory: MemoryEstimate


@dataclass(frozen=True)
class RunEstimate:
    """Sizes of a run."""

    num_parameters: int
    """Of the model, the tied embedding counted once and unpadded."""
    stages: tuple[StageEstimate, ...]
    bubble: float
    """Share of a step in which a stage waits for another."""


def pad_vocabulary(size: int) -> int:
    """Rows of the embedding for a vocabulary of `size` entries."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def estimate_run(recipe: Recipe, vocabulary_size: int) -> RunEstimate:
    """Size a run.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.

    Raises:
        RecipeError: If the embedding cannot be cut into `parallel.tensor` parts, or a rank needs more memory than
            `launch.device_memory_gib`.
    """
    parallel = recipe.parallel
    padded = pad_vocabulary(recipe.model.num_used_embeddings(vocabulary_size))
    if padded % parallel.tensor:
        raise RecipeError(
            f"parallel.tensor={parallel.tensor} does not divide the embedding's {padded} rows "
            f"({vocabulary_size} tokens, padded to {VOCABULARY_MULTIPLE}): set parallel.tensor to a power of two"
        )
    stages = tuple(_stage(recipe, padded, number) for number in range(parallel.pipeline))
    sizing = RunEstimate(
        num_parameters=num_parameters(recipe.model, vocabulary_size),
        stages=stages,
        bubble=pipeline_bubble(parallel.pipeline, recipe.num_microbatches, parallel.virtual_stages),
    )
    _check_memory(recipe, sizing)
    return sizing


def pipeline_bubble(stages: int, microbatches: int, virtual_stages: int = 1) -> float:
    """Share of a step that each of p stages idles under 1F1B with m microbatches, v chunks a stage.

    (p - 1) / (v m + p - 1). From Narayanan et al. 2021, arXiv 2104.04473, 2.2.1 and 2.2.2, which give it relative to
    the busy time: (p - 1) / (v m).
    """
    return (stages - 1) / (virtual_stages * microbatches + stages - 1)


def count_live_passes(parallel: Parallel, microbatches: int, stage: int) -> tuple[int, ...]:
    """Forward passes through each chunk of a stage whose activations are kept when there are the most.

    That is once the pipeline is warm. Megatron-Core's interleaved schedule (arXiv 2104.04473, 2.2.2) lets groups of
    g microbatches pass through one chunk, then the next; stage s begins backward passes after
    2 (p - s - 1) + (v - 1) g forward ones, where 1F1B without chunks does so after p - s - 1.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_stages
    if chunks == 1:
        return (min(microbatches, stages - stage),)
    group = parallel.microbatch_group_size(microbatches)
    ahead = 2 * (stages - stage - 1) + (chunks - 1) * group + 1
    order = [
        chunk
        for first in range(0, microbatches, group)
        for chunk in range(chunks)
        for _ in range(first, min(first + group, microbatches))
    ]
    return tuple(order[:ahead].count(chunk) for chunk in range(chunks))


def estimate_seconds(recipe: Recipe, flops: float) -> float | None:
    """Seconds that training takes, None where the device's peak is not known.

    The share of the peak that is reached (MFU, PaLM, arXiv 2204.02311, appendix B) is assumed, and counts pipeline
    bubble and communication as losses; data, checkpoints and held-out losses come on top.

    Args:
        recipe: The run.
        flops: Training FLOPs.
    """
    peak = recipe.launch.peak_tflops
    if peak is None:
        return None
    return flops / (recipe.parallel.num_workers * peak * 1e12 * recipe.launch.assumed_mfu)


def _stage(recipe: Recipe, padded: int, number: int) -> StageEstimate:
    """Pipeline stage `number`, from 0; an embedding of `padded` rows."""
    parallel, is_last = recipe.parallel, number == recipe.parallel.pipeline - 1
    kept = count_live_passes(parallel, recipe.num_microbatches, number)
    layers = parallel.layers_per_chunk(recipe.model.num_layers)[number]
    weights = _stage_parameters(recipe, padded, sum(layers), is_first=number == 0, is_last=is_last)
    element = _element_bytes(recipe)
    main_weights = 4 if element < 4 else 0  # the optimizer's own, where the model's are not fp32
    logits = _logit_bytes(recipe, padded) if is_last else 0
    passes = [
        count * _pass_bytes(recipe, layers[chunk], is_last=is_last and chunk == len(kept) - 1)
        for chunk, count in enumerate(kept)
    ]
    again = _layer_bytes(recipe)[1]
    if is_last:  # whose logits and final norm are gone when the first layer is computed again
        again -= logits + _end_bytes(recipe, is_last=True)
    memory = MemoryEstimate(
        weights=element * weights,
        gradients=4 * weights,
        optimizer=(main_weights + 4 + 4) * -(-weights // parallel.data),
        activations=sum(passes) + max(again, 0) + _rotary_bytes(recipe),
        logits=logits,
    )
    return StageEstimate(sum(layers), weights, sum(kept) / len(kept), memory)


def _stage_parameters(
    recipe: Recipe, padded: int, layers: int, *, is_first: bool, is_last: bool
) -> int:
    """Parameters of one rank: matrices are cut over tensor ranks, norms are not."""
    model, parallel = recipe.model, recipe.parallel
    outer = outer_tensor_shapes(model, padded)
    first = {name: shape for name, shape in outer.items() if name.startswith("embedding.")}
    last = {name: shape for name, shape in outer.items() if name not in first}
    if (
        model.tie_embeddings and parallel.pipeline > 1
    ):  # with several stages, the last holds a copy of the first's
        last |= {EMBEDDING: outer[EMBEDDING]}
    return (
        layers * _of_rank(model, layer_tensor_shapes(model), parallel.tensor)
        + is_first * _of_rank(model, first, parallel.tensor)
        + is_last * _of_rank(model, last, parallel.tensor)
    )


def _of_rank(model: Architecture, tensors: dict[str, Shape], tensor: int) -> int:
    """Numbers that a tensor rank has of them."""
    cut = {name: shape for name, shape in tensors.items() if is_sharded(model, name)}
    return num_elements(tensors) - num_elements(cut) + num_elements(cut) // tensor


def _element_bytes(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation; fp8 is counted as bf16, which its copies of weights come on top of."""
    return 4 if recipe.precision == "fp32" else 2


def _pass_bytes(recipe: Recipe, layers: int, *, is_last: bool) -> int:
    """Bytes that a microbatch's pass through a chunk leaves on a rank for the backward pass, logits apart."""
    length = recipe.objective.sequence_length
    recomputes = recipe.training.recompute != "none"
    intervals = recipe.training.micro_batch_size * 2 * 4 * length if recomputes else 0
    return layers * _layer_bytes(recipe)[0] + _end_bytes(recipe, is_last=is_last) + intervals


def _end_bytes(recipe: Recipe, *, is_last: bool) -> int:
    """What a pass through a chunk keeps after its layers: what it sends on, or the final norm."""
    positions, parts = _positions(recipe), _row_parts(recipe)
    width = (3 if is_last else 1) * recipe.model.hidden_size
    return positions * (_element_bytes(recipe) * width + 4 * is_last) // parts


def _layer_bytes(recipe: Recipe) -> tuple[int, int]:
    """What a layer keeps of a microbatch, and what comes on top while it is computed again, one layer at a time."""
    model, parallel, element = recipe.model, recipe.parallel, _element_bytes(recipe)
    positions, length, parts = (
        _positions(recipe),
        recipe.objective.sequence_length,
        _row_parts(recipe),
    )
    # A dense mask, made a bias in each layer, and a statistic of the softmax in fp32.
    bias = element * length if recipe.attention_backend == "sdpa" else 0
    attention = positions * (bias + 4 * model.num_heads // parallel.tensor)
    rotations = 4 * length * model.head_dim  # cosines and sines of queries and keys
    mlp = _mlp_bytes(recipe)
    kept = element * _layer_elements(recipe) + 4 * _statistics(recipe) + mlp
    whole = positions * kept + element * rotations
    if recipe.training.recompute == "selective":
        output, norm = model.hidden_size // parallel.tensor, _norm_elements(recipe)
        # The layer's own MLP has gone when its attention is computed again.
        return whole, attention + positions * (element * (output - norm) - mlp)
    whole += attention
    if recipe.training.recompute == "full":
        read = positions * element * model.hidden_size // parts
        return read, whole - read
    return whole, 0


def _rotary_bytes(recipe: Recipe) -> int:
    """The fp32 angles of rotary positions, which a layer that is computed again keeps; all share those of a chunk."""
    kinds = 1 if recipe.model.local_rope_theta is None else 2
    angles = kinds * recipe.objective.sequence_length * recipe.model.head_dim
    return 0 if recipe.training.recompute == "none" else 4 * angles * recipe.parallel.virtual_stages


def _positions(recipe: Recipe) -> int:
    """Positions of a microbatch."""
    return recipe.training.micro_batch_size * recipe.objective.sequence_length


def _row_parts(recipe: Recipe) -> int:
    """Parts that sequence parallelism cuts rows into between the tensor-parallel matrices."""
    return recipe.parallel.tensor if recipe.parallel.sequence_parallel else 1


def _layer_elements(recipe: Recipe) -> int:
    """Activations that a layer keeps of each position, its MLP's apart.

    Korthikanti et al. 2022, arXiv 2205.05198, 4.1 and 4.2, count 10 h + 24 h / t + 5 a s / t bytes a position of a
    GPT layer at 16 bits. Here, with hidden size h, key/value width g and t tensor ranks:

    - two RMSNorms keep their input, the normalised input and their output, which every tensor rank has whole, 6 h,
      unless sequence parallelism cuts them, 6 h/t (a fused kernel keeps a third less); the two more of a sandwich keep
      no output, 4 h (those that are zero-centered work in fp32, where a fused kernel then keeps as much in bf16);
    - attention keeps rotated queries h/t and keys g/t, the projection that values are a part of (h + 2 g)/t, and its
      output h/t; with fewer key/value heads than tensor ranks, the projection is gathered whole;
    - norms of queries and keys keep these normalised, and a copy of queries where a rank has several key/value heads;
    - a fused attention kernel keeps no scores (their 5 a s), but torch's SDPA the mask: see `_layer_bytes`. Should
      torch take its unfused one, the scores come on top;
    - there is no dropout, hence no dropout mask.
    """
    model, tensor = recipe.model, recipe.parallel.tensor
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projection = queries + 2 * keys
    if model.num_kv_heads < tensor:
        keys, attention = model.head_dim, projection
    else:
        keys, attention = keys // tensor, projection // tensor
    attention += 2 * queries // tensor + keys
    if model.qk_norm is not None:
        copies = 2 if model.num_kv_heads > tensor else 1
        attention += copies * queries // tensor + keys
    return 2 * _norm_elements(recipe) + attention


def _norm_elements(recipe: Recipe) -> int:
    """Activations that the norms of attention keep of each position, and those of the MLP."""
    norms = 5 if recipe.model.block == "sandwich" else 3
    return norms * recipe.model.hidden_size // _row_parts(recipe)


def _statistics(recipe: Recipe) -> int:
    """Numbers in fp32 that a layer's norms keep of each position, one each, or for queries and keys one a head."""
    model, tensor = recipe.model, recipe.parallel.tensor
    norms = (4 if model.block == "sandwich" else 2) // _row_parts(recipe)
    heads = 0 if model.qk_norm is None else model.num_heads + max(model.num_kv_heads, tensor)
    return norms + heads // tensor


def _mlp_bytes(recipe: Recipe) -> int:
    """What a layer's MLP keeps of each position.

    With feed-forward width f and t tensor ranks, SwiGLU keeps its two inputs 2 f/t, the shifted linear one, the
    activated one and their product: 5 f/t; an MLP without a gate its input and its output, 2 f/t. An expert's product
    is kept weighted as well, and the expert's own copy of the token: h + 6 f/t for each of the k that a token is sent
    to. The router keeps fp32 probabilities and the int64 places of what it picked.
    """
    model, element, tensor = recipe.model, _element_bytes(recipe), recipe.parallel.tensor
    width, inner, parts = model.hidden_size, model.ffn_hidden_size, _row_parts(recipe)
    if model.num_experts is None or model.num_experts_per_token is None:
        return element * (5 if model.is_gated else 2) * inner // tensor
    picked = model.num_experts_per_token
    own = 4 * model.num_experts + 12 * picked + (4 * width if element < 4 else 0)
    gathered = 5 * model.num_experts + 12 * picked
    return element * picked * (width + 6 * inner // tensor) + own // parts + gathered


def _logit_bytes(recipe: Recipe, padded: int) -> int:
    """Bytes of one microbatch's logits on a tensor rank: in fp32, and in bf16 beside them where the model is.

    The last stage goes back through each microbatch at once, so that it never has those of two.
    """
    copy = 2 if _element_bytes(recipe) == 2 else 0
    return _positions(recipe) * padded // recipe.parallel.tensor * (4 + copy)


def _check_memory(recipe: Recipe, sizing: RunEstimate) -> None:
    available = recipe.launch.memory_gib
    number, stage = max(enumerate(sizing.stages), key=lambda one: one[1].memory.total)
    memory = stage.memory
    if available is None or memory.total <= available * GIB:
        return
    kinds = ", ".join(f"{kind} {count / GIB:.2f}" for kind, count in memory.by_kind.items())
    if memory.weights + memory.gradients + memory.optimizer > available * GIB:
        remedy = "raise parallel.tensor, parallel.pipeline or parallel.num_workers"
    else:  # more stages keep more microbatches, each of fewer layers
        recompute = "" if recipe.training.recompute == "full" else "set training.recompute=full, "
        remedy = (
            f"{recompute}raise parallel.tensor, or lower training.micro_batch_size={recipe.training.micro_batch_size} or "
            f"objective.sequence_length={recipe.objective.sequence_length}"
        )
    raise RecipeError(
        f"a rank of pipeline stage {number} needs {memory.total / GIB:.2f} GiB ({kinds}), "
        f"its device has launch.device_memory_gib={available:g}: {remedy}"
    )
