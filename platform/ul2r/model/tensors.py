"""Names and whole shapes of a model's tensors in Megatron-Core's checkpoints. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ul2r.config import Architecture

Shape = tuple[int, ...]
LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
EXPERTS = "mlp.experts.experts."
SHARDED = (
    EMBEDDING,
    OUTPUT,
    *(f"linear_{matrix}.weight" for matrix in ("qkv", "proj", "fc1", "fc2")),
    # Not proj and fc2: their outputs are summed over tensor ranks, and the bias, whole on each rank, is added after
    # that.
    *(f"linear_{matrix}.bias" for matrix in ("qkv", "fc1")),
)
"""Ends of the names of tensors that are sharded over tensor ranks."""


def outer_tensor_shapes(architecture: Architecture, num_embeddings: int) -> dict[str, Shape]:
    """Return the tensors outside of the layers, for an embedding of `num_embeddings` rows."""
    hidden = architecture.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (num_embeddings, hidden)}
    if architecture.position_embedding == "learned":
        assert architecture.max_position_embeddings is not None
        positions = architecture.max_position_embeddings
        shapes["embedding.position_embeddings.weight"] = (positions, hidden)
    shapes |= _norm_shapes(architecture, "decoder.final_layernorm.")
    if not architecture.tie_embeddings:
        shapes[OUTPUT] = (num_embeddings, hidden)
    return shapes


def layer_tensor_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Return the tensors of one layer, without the prefix `LAYERS`.

    Checkpoints stack those of all layers. Tensors of experts begin with `EXPERTS` and are stacked by expert as well.
    """
    a = architecture
    hidden = a.hidden_size
    queries = a.num_heads * a.head_dim
    keys = a.num_kv_heads * a.head_dim
    projected = queries + 2 * keys
    has_post_norms = a.block in {"post_norm", "sandwich"}

    shapes: dict[str, Shape] = {}
    if a.block != "post_norm":
        # TransformerEngine fuses a norm into the matrix after it, and Megatron's local layers rename theirs to the same
        # keys.
        shapes |= _norm_shapes(a, "self_attention.linear_qkv.layer_norm_")
    shapes["self_attention.linear_qkv.weight"] = (projected, hidden)
    if a.bias is not None:
        shapes["self_attention.linear_qkv.bias"] = (projected,)
    if a.qk_norm is not None:
        is_full = a.qk_norm == "full"
        shapes["self_attention.q_layernorm.weight"] = (queries if is_full else a.head_dim,)
        shapes["self_attention.k_layernorm.weight"] = (keys if is_full else a.head_dim,)
    shapes["self_attention.linear_proj.weight"] = (hidden, queries)
    if a.bias == "all":
        shapes["self_attention.linear_proj.bias"] = (hidden,)
    if has_post_norms:
        shapes |= _norm_shapes(a, "post_attention_layernorm.")

    shapes |= _mlp_shapes(a)
    if has_post_norms:
        shapes |= _norm_shapes(a, "post_mlp_layernorm.")
    return shapes


def _mlp_shapes(a: Architecture) -> dict[str, Shape]:
    """Return the tensors of a layer's MLP and of the norm before it."""
    hidden = a.hidden_size
    inner = a.ffn_hidden_size
    outputs = 2 * inner if a.is_gated else inner  # Megatron fuses the gate and the linear input
    if a.num_experts is not None:
        return {
            **_norm_shapes(a, "pre_mlp_layernorm."),
            "mlp.router.weight": (a.num_experts, hidden),
            EXPERTS + "linear_fc1.weight": (a.num_experts, outputs, hidden),
            EXPERTS + "linear_fc2.weight": (a.num_experts, hidden, inner),
        }

    has_norm = a.block in {"sequential", "parallel_two_norms", "sandwich"}
    shapes = _norm_shapes(a, "mlp.linear_fc1.layer_norm_") if has_norm else {}
    shapes["mlp.linear_fc1.weight"] = (outputs, hidden)
    if a.bias == "all":
        shapes["mlp.linear_fc1.bias"] = (outputs,)
    shapes["mlp.linear_fc2.weight"] = (hidden, inner)
    if a.bias == "all":
        shapes["mlp.linear_fc2.bias"] = (hidden,)
    return shapes


def iter_tensors(
    architecture: Architecture, num_embeddings: int
) -> Iterator[tuple[str, tuple[int, ...], Shape]]:
    """Yield every tensor, those that checkpoints stack one by one: name, index in the stack and shape.

    The index is empty outside of layers, (layer,) inside, and (layer, expert) for experts.

    Args:
        architecture: The model.
        num_embeddings: Rows of the embedding.
    """
    for key, shape in outer_tensor_shapes(architecture, num_embeddings).items():
        yield key, (), shape
    for layer in range(architecture.num_layers):
        for key, shape in layer_tensor_shapes(architecture).items():
            if key.startswith(EXPERTS):
                for expert in range(shape[0]):
                    yield LAYERS + key, (layer, expert), shape[1:]
            else:
                yield LAYERS + key, (layer,), shape


def is_sharded(architecture: Architecture, name: str) -> bool:
    """Return whether each tensor-parallel rank has its own part of a tensor instead of a copy."""
    if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return architecture.qk_norm == "full"
    return name.endswith(SHARDED)


def num_elements(tensors: dict[str, Shape]) -> int:
    """Return the elements of all tensors together."""
    return sum(prod(shape) for shape in tensors.values())


def _norm_shapes(architecture: Architecture, prefix: str) -> dict[str, Shape]:
    parts = ("weight", "bias") if architecture.norm_bias else ("weight",)
    return {prefix + part: (architecture.hidden_size,) for part in parts}
