"""What a run needs, from its recipe alone: parameters and memory of each rank, pipeline bubble, time.

Pure arithmetic over how `model/build.py` and `train/` set Megatron-Core up; nothing is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ul2r.config import Architecture, Recipe
from ul2r.errors import RecipeError
from ul2r.model.flops import parameters
from ul2r.model.tensors import EMBEDDING, Shape, elements, is_cut, layer_tensors, outer_tensors

GIB = 2**30
VOCABULARY_MULTIPLE = 128
"""The embedding is padded to this, so that its shape is one for every tensor-parallel size."""


@dataclass(frozen=True)
class Memory:
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
class Stage:
    """One pipeline stage, as any of its tensor ranks has it."""

    layers: int
    parameters: int
    """Of one rank; the padded embedding is on the first stage and, as output projection, on the last."""
    microbatches: int
    """Microbatches whose activations are kept at the same time."""
    memory: Memory


@dataclass(frozen=True)
class Sizing:
    """Sizes of a run."""

    parameters: int
    """Of the model, the tied embedding counted once and unpadded."""
    stages: tuple[Stage, ...]
    bubble: float
    """Share of a step in which a stage waits for another."""


def padded_vocabulary(size: int) -> int:
    """Rows of the embedding for a vocabulary of `size` entries."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def size_run(recipe: Recipe, vocabulary_size: int) -> Sizing:
    """Size a run.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.

    Raises:
        RecipeError: If the embedding cannot be cut into `parallel.tensor` parts, or a rank needs more memory than
            `launch.device_memory_gib`.
    """
    parallel = recipe.parallel
    padded = padded_vocabulary(recipe.model.rows(vocabulary_size))
    if padded % parallel.tensor:
        raise RecipeError(
            f"parallel.tensor={parallel.tensor} does not divide the embedding's {padded} rows "
            f"({vocabulary_size} tokens, padded to {VOCABULARY_MULTIPLE}): set parallel.tensor to a power of two"
        )
    stages = tuple(_stage(recipe, padded, number) for number in range(parallel.pipeline))
    sizing = Sizing(
        parameters=parameters(recipe.model, vocabulary_size),
        stages=stages,
        bubble=pipeline_bubble(parallel.pipeline, recipe.microbatches),
    )
    _check_memory(recipe, sizing)
    return sizing


def pipeline_bubble(stages: int, microbatches: int) -> float:
    """Share of a step that each of p stages idles under 1F1B with m microbatches: (p - 1) / (m + p - 1).

    From Narayanan et al. 2021, arXiv 2104.04473, 2.2.1, which gives it relative to the busy time: (p - 1) / m.
    """
    return (stages - 1) / (microbatches + stages - 1)


def expected_seconds(recipe: Recipe, flops: float) -> float | None:
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
    return flops / (recipe.parallel.workers * peak * 1e12 * recipe.launch.assumed_mfu)


def _stage(recipe: Recipe, padded: int, number: int) -> Stage:
    """Pipeline stage `number`, from 0; an embedding of `padded` rows."""
    parallel, is_last = recipe.parallel, number == recipe.parallel.pipeline - 1
    kept = min(recipe.microbatches, parallel.pipeline - number)  # 1F1B: what warms the pipeline up
    weights = _stage_parameters(recipe, padded, is_first=number == 0, is_last=is_last)
    element = _element_bytes(recipe)
    main_weights = 4 if element < 4 else 0  # the optimizer's own, where the model's are not fp32
    memory = Memory(
        weights=element * weights,
        gradients=4 * weights,
        optimizer=(main_weights + 4 + 4) * -(-weights // parallel.data),
        activations=kept * _activation_bytes(recipe, is_last=is_last),
        logits=_logit_bytes(recipe, padded) if is_last else 0,
    )
    return Stage(recipe.model.layers // parallel.pipeline, weights, kept, memory)


def _stage_parameters(recipe: Recipe, padded: int, *, is_first: bool, is_last: bool) -> int:
    """Parameters of one rank: matrices are cut over tensor ranks, norms are not."""
    model, parallel = recipe.model, recipe.parallel
    layers = model.layers // parallel.pipeline
    outer = outer_tensors(model, padded)
    first = {name: shape for name, shape in outer.items() if name.startswith("embedding.")}
    last = {name: shape for name, shape in outer.items() if name not in first}
    if (
        model.tied and parallel.pipeline > 1
    ):  # with several stages, the last holds a copy of the first's
        last |= {EMBEDDING: outer[EMBEDDING]}
    return (
        layers * _of_rank(model, layer_tensors(model), parallel.tensor)
        + is_first * _of_rank(model, first, parallel.tensor)
        + is_last * _of_rank(model, last, parallel.tensor)
    )


def _of_rank(model: Architecture, tensors: dict[str, Shape], tensor: int) -> int:
    """Numbers that a tensor rank has of them."""
    cut = {name: shape for name, shape in tensors.items() if is_cut(model, name)}
    return elements(tensors) - elements(cut) + elements(cut) // tensor


def _element_bytes(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation: bf16 on a GPU, fp32 on a CPU."""
    return 2 if recipe.launch.gpus_per_worker else 4


def _activation_bytes(recipe: Recipe, *, is_last: bool) -> int:
    """Bytes that one microbatch leaves on a stage's rank for the backward pass, logits apart."""
    model, length = recipe.model, recipe.objective.sequence_length
    rows, element = recipe.training.microbatch_rows, _element_bytes(recipe)
    layers = model.layers // recipe.parallel.pipeline
    position = layers * _layer_elements(model, recipe.parallel.tensor)
    position += (3 if is_last else 1) * model.hidden_size  # the final norm's, or what is sent on
    row = layers * length * length  # the attention mask, made a bias in each layer
    rotations = layers * 4 * length * model.head_dim  # cosines and sines of queries and keys
    statistics = layers * (2 + model.heads // recipe.parallel.tensor) + is_last  # fp32
    elements = rows * (length * position + row) + rotations
    return element * elements + 4 * rows * length * statistics


def _layer_elements(model: Architecture, tensor: int) -> int:
    """Activations that a layer keeps of each position.

    Korthikanti et al. 2022, arXiv 2205.05198, 4.1 and 4.2, count 10 h + 24 h / t + 5 a s / t bytes a position of a
    GPT layer at 16 bits. Here, with hidden size h, key/value width g, feed-forward width f and t tensor ranks:

    - two RMSNorms keep their input, the normalised input and their output, which every tensor rank has whole: 6 h
      (a fused kernel keeps 2 h less);
    - attention keeps rotated queries h/t and keys g/t, the projection that values are a part of (h + 2 g)/t, and its
      output h/t; with fewer key/value heads than tensor ranks, the projection is gathered whole;
    - the fused attention kernel keeps no scores (their 5 a s), but the mask: see `_activation_bytes`. Should torch
      take its unfused one, the scores come on top;
    - SwiGLU keeps its two inputs 2 f/t, the shifted linear one, the activated one and their product: 5 f/t;
    - there is no dropout, hence no dropout mask.
    """
    width, keys = model.hidden_size, model.kv_heads * model.head_dim
    queries = model.heads * model.head_dim
    projection = queries + 2 * keys
    if model.kv_heads < tensor:
        attention = 2 * queries // tensor + model.head_dim + projection
    else:
        attention = (2 * queries + keys + projection) // tensor
    return 6 * width + attention + 5 * model.ffn_hidden_size // tensor


def _logit_bytes(recipe: Recipe, padded: int) -> int:
    """Bytes of one microbatch's logits on a tensor rank: in fp32, and in bf16 beside them where the model is.

    The last stage goes back through each microbatch at once, so that it never has those of two.
    """
    positions = recipe.training.microbatch_rows * recipe.objective.sequence_length
    copy = 2 if _element_bytes(recipe) == 2 else 0
    return positions * padded // recipe.parallel.tensor * (4 + copy)


def _check_memory(recipe: Recipe, sizing: Sizing) -> None:
    available = recipe.launch.memory_gib
    number, stage = max(enumerate(sizing.stages), key=lambda one: one[1].memory.total)
    memory = stage.memory
    if available is None or memory.total <= available * GIB:
        return
    kinds = ", ".join(f"{kind} {count / GIB:.2f}" for kind, count in memory.by_kind.items())
    if memory.weights + memory.gradients + memory.optimizer > available * GIB:
        remedy = "raise parallel.tensor, parallel.pipeline or parallel.workers"
    else:  # more stages keep more microbatches, each of fewer layers
        remedy = (
            f"raise parallel.tensor, or lower training.microbatch_rows={recipe.training.microbatch_rows} or "
            f"objective.sequence_length={recipe.objective.sequence_length}"
        )
    raise RecipeError(
        f"a rank of pipeline stage {number} needs {memory.total / GIB:.2f} GiB ({kinds}), "
        f"its device has launch.device_memory_gib={available:g}: {remedy}"
    )
