"""Training FLOPs of a model, counted from its shapes and from what attention really sees."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ul2r.config import Architecture
from ul2r.model.tensors import EXPERTS, layer_tensor_shapes, num_elements, outer_tensor_shapes
from ul2r.model.window import Ints, clip_to_window


def num_parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Parameters of the model, a tied embedding counted once and unpadded."""
    outer = outer_tensor_shapes(architecture, architecture.num_used_embeddings(vocabulary_size))
    return architecture.num_layers * num_elements(layer_tensor_shapes(architecture)) + num_elements(outer)


def num_active_parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Those that one token passes through: of experts, as many as it is sent to."""
    return num_parameters(architecture, vocabulary_size) - _idle(architecture)


def training_flops(
    architecture: Architecture, vocabulary_size: int, positions: float, num_visible_keys: float
) -> float:
    """FLOPs of one forward and backward pass.

    Six per matrix weight and position (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), the
    output projection among the matrices, and 12 x heads x head dimension for each (query, key) pair that a layer's
    mask lets through.

    Args:
        architecture: Sizes.
        vocabulary_size: Entries of the tokenizer.
        positions: Row positions passed through the model, padding included.
        num_visible_keys: Keys that those positions see, summed over layers.
    """
    output = architecture.num_used_embeddings(vocabulary_size) * architecture.hidden_size
    weights = num_matrix_weights(architecture) + output
    attention = 12 * architecture.num_heads * architecture.head_dim
    return 6.0 * weights * positions + attention * num_visible_keys


def num_visible_keys(architecture: Architecture, kv_start: Ints, kv_end: Ints) -> int:
    """Keys that rows' queries see, summed over positions and layers, as `training_flops` wants them.

    Args:
        architecture: Its layers' windows.
        kv_start: First key that each query sees, int32 (B, S).
        kv_end: One past the last, int32 (B, S).
    """
    found = 0
    for window, layers in Counter(architecture.layer_windows).items():
        first, end = clip_to_window(kv_start, kv_end, window)
        found += layers * int((end - first).sum(dtype=np.int64))
    return found


def num_matrix_weights(architecture: Architecture) -> int:
    """Weights of every layer's matrices that a token passes through, without embedding, norms and biases."""
    tensors = layer_tensor_shapes(architecture)
    matrices = {name: shape for name, shape in tensors.items() if len(shape) > 1}
    return architecture.num_layers * num_elements(matrices) - _idle(architecture)


def _idle(architecture: Architecture) -> int:
    """Weights of the experts that a token is not sent to, in all layers."""
    if architecture.num_experts is None or architecture.num_experts_per_token is None:
        return 0
    tensors = layer_tensor_shapes(architecture)
    experts = {name: shape for name, shape in tensors.items() if name.startswith(EXPERTS)}
    idle = architecture.num_experts - architecture.num_experts_per_token
    return architecture.num_layers * num_elements(experts) // architecture.num_experts * idle
