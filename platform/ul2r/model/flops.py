"""Training FLOPs of a model, from its shapes and the attention it actually computes."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ul2r.config import Architecture
from ul2r.model.tensors import EXPERTS, layer_tensor_shapes, num_elements, outer_tensor_shapes
from ul2r.model.window import Ints, clip_to_window


def num_parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Return the parameters of the model, a tied embedding counted once and unpadded."""
    num_embeddings = architecture.num_used_embeddings(vocabulary_size)
    outer = num_elements(outer_tensor_shapes(architecture, num_embeddings))
    return architecture.num_layers * num_elements(layer_tensor_shapes(architecture)) + outer


def num_active_parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Return the parameters that one token uses: of the experts, only those it is sent to."""
    return num_parameters(architecture, vocabulary_size) - _num_idle_weights(architecture)


def training_flops(
    architecture: Architecture,
    vocabulary_size: int,
    positions: float,
    num_visible_keys: float,
    num_targets: float,
) -> float:
    """Return the FLOPs of one forward and backward pass.

    Six per matrix weight and position (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), and 12 x heads x
    head dimension for each (query, key) pair that a layer's mask allows. The output projection counts at targets only,
    where it is computed; the few more positions that round their number up do not count.

    Args:
        architecture: The model.
        vocabulary_size: Entries of the tokenizer.
        positions: Row positions passed through the layers, padding included.
        num_visible_keys: Keys visible to those positions, summed over layers.
        num_targets: Positions whose loss counts.
    """
    output = architecture.num_used_embeddings(vocabulary_size) * architecture.hidden_size
    weights = num_matrix_weights(architecture)
    attention = 12 * architecture.num_heads * architecture.head_dim
    return 6.0 * (weights * positions + output * num_targets) + attention * num_visible_keys


def num_visible_keys(architecture: Architecture, kv_start: Ints, kv_end: Ints) -> int:
    """Return the keys visible to the queries of a batch, summed over positions and layers, for `training_flops`.

    Args:
        architecture: The model, for its layers' windows.
        kv_start: First key each query sees, int32 (B, S).
        kv_end: One past the last, int32 (B, S).
    """
    total = 0
    # Layers with the same window see the same keys, so each window is computed once.
    for window, num_layers in Counter(architecture.layer_windows).items():
        start, end = clip_to_window(kv_start, kv_end, window)
        total += num_layers * int((end - start).sum(dtype=np.int64))
    return total


def num_matrix_weights(architecture: Architecture) -> int:
    """Return the weights of all layers' matrices that a token uses, without embedding, norms and biases."""
    tensors = layer_tensor_shapes(architecture)
    matrices = {name: shape for name, shape in tensors.items() if len(shape) > 1}
    return architecture.num_layers * num_elements(matrices) - _num_idle_weights(architecture)


def _num_idle_weights(architecture: Architecture) -> int:
    """Return the weights of the experts that a token is not sent to, in all layers."""
    if architecture.num_experts is None or architecture.num_experts_per_token is None:
        return 0

    tensors = layer_tensor_shapes(architecture)
    experts = {name: shape for name, shape in tensors.items() if name.startswith(EXPERTS)}
    per_expert = architecture.num_layers * num_elements(experts) // architecture.num_experts
    return per_expert * (architecture.num_experts - architecture.num_experts_per_token)
