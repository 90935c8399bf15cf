"""Training FLOPs of a model, counted from its shapes and from what attention really sees."""

from __future__ import annotations

from ul2r.config import Architecture


def parameters(architecture: Architecture, vocabulary_size: int) -> int:
    """Parameters of the model, the tied embedding counted once and unpadded."""
    width, norms = architecture.hidden_size, 2 * architecture.layers + 1
    return matrix_weights(architecture) + vocabulary_size * width + norms * width


def training_flops(
    architecture: Architecture, vocabulary_size: int, positions: float, seen_keys: float
) -> float:
    """FLOPs of one forward and backward pass.

    Six per matrix weight and position (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), the
    output projection among the matrices, and 12 x hidden size per layer and (query, key) pair that the
    mask lets through.

    Args:
        architecture: Sizes.
        vocabulary_size: Entries of the tokenizer.
        positions: Row positions passed through the model, padding included.
        seen_keys: Sum of hi - lo over those positions.
    """
    weights = matrix_weights(architecture) + vocabulary_size * architecture.hidden_size
    attention = 12 * architecture.layers * architecture.hidden_size
    return 6.0 * weights * positions + attention * seen_keys


def matrix_weights(architecture: Architecture) -> int:
    """Weights of every layer's matrices, without embedding and norms."""
    width, head = architecture.hidden_size, architecture.head_dim
    attention = 2 * width * width + 2 * width * architecture.kv_heads * head
    return architecture.layers * (attention + 3 * width * architecture.ffn_hidden_size)
