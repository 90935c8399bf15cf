"""Training FLOPs of a model, counted from its shapes and from what attention really sees."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ul2r.config import Architecture
from ul2r.model.tensors import EXPERTS, elements, layer_tensors, outer_tensors
from ul2r.model.window import Ints, within


def parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Parameters of the model, a tied embedding counted once and unpadded."""
    outer = outer_tensors(architecture, architecture.rows(vocabulary_size))
    return architecture.layers * elements(layer_tensors(architecture)) + elements(outer)


def active_parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Those that one token passes through: of experts, as many as it is sent to."""
    return parameters(architecture, vocabulary_size) - _idle(architecture)


def training_flops(
    architecture: Architecture, vocabulary_size: int, positions: float, seen_keys: float
) -> float:
    """FLOPs of one forward and backward pass.

    Six per matrix weight and position (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), the
    output projection among the matrices, and 12 x heads x head dimension for each (query, key) pair that a layer's
    mask lets through.

    Args:
        architecture: Sizes.
        vocabulary_size: Entries of the tokenizer.
        positions: Row positions passed through the model, padding included.
        seen_keys: Keys that those positions see, summed over layers.
    """
    output = architecture.rows(vocabulary_size) * architecture.hidden_size
    weights = matrix_weights(architecture) + output
    attention = 12 * architecture.heads * architecture.head_dim
    return 6.0 * weights * positions + attention * seen_keys


def seen_keys(architecture: Architecture, lo: Ints, hi: Ints) -> int:
    """Keys that rows' queries see, summed over positions and layers, as `training_flops` wants them.

    Args:
        architecture: Its layers' windows.
        lo: First key that each query sees, int32 (B, S).
        hi: One past the last, int32 (B, S).
    """
    found = 0
    for window, layers in Counter(architecture.windows).items():
        first, end = within(lo, hi, window)
        found += layers * int((end - first).sum(dtype=np.int64))
    return found


def matrix_weights(architecture: Architecture) -> int:
    """Weights of every layer's matrices that a token passes through, without embedding, norms and biases."""
    tensors = layer_tensors(architecture)
    matrices = {name: shape for name, shape in tensors.items() if len(shape) > 1}
    return architecture.layers * elements(matrices) - _idle(architecture)


def _idle(architecture: Architecture) -> int:
    """Weights of the experts that a token is not sent to, in all layers."""
    if architecture.experts is None or architecture.experts_per_token is None:
        return 0
    tensors = layer_tensors(architecture)
    experts = {name: shape for name, shape in tensors.items() if name.startswith(EXPERTS)}
    idle = architecture.experts - architecture.experts_per_token
    return architecture.layers * elements(experts) // architecture.experts * idle
