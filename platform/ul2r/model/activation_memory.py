"""Bytes of activations that a rank keeps for the backward pass, by arithmetic on a recipe.

With micro-batch size b, sequence length s, hidden size h, key/value width g, feed-forward width f and t tensor ranks.
Korthikanti et al. 2022, arXiv 2205.05198, 4.1 and 4.2, count 10 h + 24 h / t + 5 a s / t bytes per position of a GPT
layer at 16 bits; the functions below count the layers that are built here. tests/distributed/test_sizing.py compares
them with what torch's autograd saves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ul2r.config import Denoiser, Objective, Prefix, Recipe, SpanCorruption

NUM_OUTPUT_SIZES = 32
"""Numbers of positions that a microbatch's logits may have, those of `train/transfer.py`."""


class LayerBytes(NamedTuple):
    """Activations of one layer and one microbatch.

    Attributes:
        kept: Bytes kept between the forward and the backward pass.
        recomputed: Bytes on top while the layer is recomputed, one layer at a time.
    """

    kept: int
    recomputed: int


def element_bytes(recipe: Recipe) -> int:
    """Return the bytes of a weight and of an activation; fp8 counts as bf16, without its extra copies of weights."""
    return 4 if recipe.precision == "fp32" else 2


def chunk_bytes(recipe: Recipe, num_layers: int, *, is_last: bool) -> int:
    """Return the bytes that one microbatch leaves in a chunk of layers for the backward pass, without logits."""
    return num_layers * layer_bytes(recipe).kept + output_bytes(recipe, is_last=is_last)


def interval_bytes(recipe: Recipe) -> int:
    """Return the bytes of the intervals, int32 (B, 2, S) of all microbatches of a step in one piece of memory.

    Recomputation keeps its inputs, and thereby them, for all chunks and microbatches together.
    """
    if recipe.training.recompute == "none":
        return 0
    num_rows = recipe.training.micro_batch_size * recipe.num_microbatches
    return num_rows * 2 * 4 * recipe.objective.sequence_length


def output_bytes(recipe: Recipe, *, is_last: bool) -> int:
    """Return the bytes kept after a chunk's layers: the hidden states it sends, or the final norm's tensors."""
    # The final norm keeps what every RMSNorm does: its input, the normalized input and its output.
    width = (3 if is_last else 1) * recipe.model.hidden_size
    statistics = 4 * is_last  # the norm's, one fp32 number per position
    return (
        _num_positions(recipe)
        * (element_bytes(recipe) * width + statistics)
        // _num_row_parts(recipe)
    )


def layer_bytes(recipe: Recipe) -> LayerBytes:
    """Return the activations of one layer and one microbatch."""
    model = recipe.model
    tensor = recipe.parallel.tensor
    element = element_bytes(recipe)
    positions = _num_positions(recipe)
    length = recipe.objective.sequence_length

    # SDPA turns the dense mask into an additive bias in each layer; every kernel keeps an fp32 statistic per head.
    bias = element * length if recipe.attention_backend == "sdpa" else 0
    attention = positions * (bias + 4 * model.num_heads // tensor)
    rotations = 4 * length * model.head_dim  # cosines and sines of queries and keys
    mlp = _mlp_bytes(recipe)
    per_position = element * _num_attention_elements(recipe) + 4 * _num_statistics(recipe) + mlp
    total = positions * per_position + element * rotations

    if recipe.training.recompute == "selective":
        # The layer's own MLP has been freed by the time its attention is recomputed.
        output = model.hidden_size // tensor
        freed = element * _num_norm_elements(recipe) + mlp
        return LayerBytes(total, attention + positions * (element * output - freed))

    total += attention
    if recipe.training.recompute == "full":
        layer_input = positions * element * model.hidden_size // _num_row_parts(recipe)
        return LayerBytes(layer_input, total - layer_input)
    return LayerBytes(total, 0)


def rotary_bytes(recipe: Recipe) -> int:
    """Return the bytes of the fp32 rotary angles, which recomputation keeps once for all layers of a chunk."""
    if recipe.training.recompute == "none":
        return 0
    num_kinds = 1 if recipe.model.local_rope_theta is None else 2
    angles = num_kinds * recipe.objective.sequence_length * recipe.model.head_dim
    return 4 * angles * recipe.parallel.virtual_stages


def logit_bytes(recipe: Recipe, num_embeddings: int, *, is_training: bool) -> int:
    """Return the bytes of one microbatch's logits on a tensor rank: fp32, and a bf16 copy if the model is bf16.

    The last stage runs the backward pass of each microbatch right after its forward pass, so it holds those of one.

    Args:
        recipe: The run.
        num_embeddings: Rows of the padded embedding.
        is_training: Whether logits are those of the most targets that a microbatch of the mixture can have; validation
            measures plain text as well, whose positions all are targets.
    """
    copy = 2 if element_bytes(recipe) == 2 else 0
    positions = _num_positions(recipe)
    if is_training:
        most = recipe.training.micro_batch_size * max_row_targets(recipe.objective)
        step = max(positions // NUM_OUTPUT_SIZES, 1)
        positions = min(-(-most // step) * step, positions)
    return positions * num_embeddings // recipe.parallel.tensor * (4 + copy)


def max_row_targets(objective: Objective) -> int:
    """Return the most positions of a row whose loss can count."""
    return max(
        _max_targets(denoiser, objective) * (1 if denoiser.whole_row else objective.slots_per_row)
        for denoiser in objective.mixture
    )


def _max_targets(denoiser: Denoiser, objective: Objective) -> int:
    """Return the most targets of an example: all of it, unless the denoiser predicts a given part of its window."""
    longest = objective.max_example_length(denoiser) - 1
    raw_length = objective.raw_length(denoiser)
    if isinstance(denoiser, SpanCorruption):
        # Each span begins with its sentinel, and an eos ends the targets.
        targets = denoiser.num_noise_tokens(raw_length) + denoiser.num_sentinels(raw_length) + 1
    elif isinstance(denoiser, Prefix) and denoiser.noise_density is not None:
        targets = math.ceil(raw_length * denoiser.noise_density) + denoiser.sentinel + 1
    else:
        targets = longest
    return min(targets, longest)


def _num_positions(recipe: Recipe) -> int:
    """Return b s, the positions of a microbatch."""
    return recipe.training.micro_batch_size * recipe.objective.sequence_length


def _num_row_parts(recipe: Recipe) -> int:
    """Return the number of parts that sequence parallelism cuts rows into between tensor-parallel matrices."""
    return recipe.parallel.tensor if recipe.parallel.sequence_parallel else 1


def _num_attention_elements(recipe: Recipe) -> int:
    """Return the activations kept per position by a layer without its MLP.

    - Two RMSNorms keep their input, the normalized input and their output, which every tensor rank has whole: 6 h,
      or 6 h/t with sequence parallelism (a fused kernel keeps a third less). The two more of a sandwich block keep no
      output: 4 h. Zero-centered norms work in fp32, for which a fused kernel then keeps as much in bf16.
    - Attention keeps rotated queries h/t and keys g/t, the projection that contains the values (h + 2 g)/t, and its
      output h/t. With fewer key/value heads than tensor ranks, the projection is gathered whole.
    - Norms of queries and keys keep these normalized, and a copy of queries if a rank has several key/value heads.
    - A fused attention kernel keeps no scores (their 5 a s), but torch's SDPA keeps the mask: see `layer_bytes`. If
      torch falls back to its unfused kernel, the scores come on top.
    - There is no dropout, hence no dropout mask.
    """
    model = recipe.model
    tensor = recipe.parallel.tensor
    queries = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    projection = queries + 2 * keys

    if model.num_kv_heads < tensor:
        keys = model.head_dim
        attention = projection
    else:
        keys //= tensor
        attention = projection // tensor
    attention += 2 * queries // tensor + keys

    if model.qk_norm is not None:
        copies = 2 if model.num_kv_heads > tensor else 1
        attention += copies * queries // tensor + keys
    return 2 * _num_norm_elements(recipe) + attention


def _num_norm_elements(recipe: Recipe) -> int:
    """Return the activations kept per position by the norms of attention; those of the MLP keep as many."""
    tensors = 5 if recipe.model.block == "sandwich" else 3
    return tensors * recipe.model.hidden_size // _num_row_parts(recipe)


def _num_statistics(recipe: Recipe) -> int:
    """Return the fp32 statistics kept per position by a layer's norms: one each, one per head for those of heads."""
    model = recipe.model
    tensor = recipe.parallel.tensor
    norms = (4 if model.block == "sandwich" else 2) // _num_row_parts(recipe)
    # A tensor rank has a key/value head at least: with fewer heads than ranks, they are copied.
    heads = 0 if model.qk_norm is None else model.num_heads + max(model.num_kv_heads, tensor)
    return norms + heads // tensor


def _mlp_bytes(recipe: Recipe) -> int:
    """Return the bytes kept per position by a layer's MLP.

    SwiGLU keeps its two inputs 2 f/t, the shifted linear one, the activated one and their product: 5 f/t. An MLP
    without a gate keeps its input and its output: 2 f/t. Experts keep the weighted product and their own copy of the
    token as well: h + 6 f/t for each of the k experts of a token. The router keeps fp32 probabilities and the int64
    indices of its choice.
    """
    model = recipe.model
    element = element_bytes(recipe)
    tensor = recipe.parallel.tensor
    inner = model.ffn_hidden_size
    if model.num_experts is None or model.num_experts_per_token is None:
        return element * (5 if model.is_gated else 2) * inner // tensor

    chosen = model.num_experts_per_token
    fp32_input = 4 * model.hidden_size if element < 4 else 0
    # An fp32 probability per expert; per chosen expert an fp32 weight and an int64 index.
    own = 4 * model.num_experts + 12 * chosen + fp32_input
    # The all-gather dispatcher's copy on every tensor rank: per expert an fp32 probability and a bool.
    gathered = 5 * model.num_experts + 12 * chosen
    experts = element * chosen * (model.hidden_size + 6 * inner // tensor)
    return experts + own // _num_row_parts(recipe) + gathered
