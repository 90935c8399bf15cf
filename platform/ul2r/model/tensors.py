"""Every tensor of a model: its name in Megatron-Core's checkpoints and its whole shape. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ul2r.config import Architecture

Shape = tuple[int, ...]
LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
EXPERTS = "mlp.experts.experts."
CUT = (
    EMBEDDING,
    OUTPUT,
    *(f"linear_{matrix}.weight" for matrix in ("qkv", "proj", "fc1", "fc2")),
    *(f"linear_{matrix}.bias" for matrix in ("qkv", "fc1")),
)


def outer_tensor_shapes(architecture: Architecture, rows: int) -> dict[str, Shape]:
    """Tensors outside of the layers, for an embedding of `rows` rows."""
    width = architecture.hidden_size
    found: dict[str, Shape] = {EMBEDDING: (rows, width)}
    if architecture.position_embedding == "learned":
        assert architecture.max_position_embeddings is not None
        found["embedding.position_embeddings.weight"] = (
            architecture.max_position_embeddings,
            width,
        )
    found |= _norm(architecture, "decoder.final_layernorm.")
    if not architecture.tie_embeddings:
        found[OUTPUT] = (rows, width)
    return found


def layer_tensor_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Tensors of one layer, without the prefix `LAYERS`; in a checkpoint all layers' are stacked.

    Those of experts begin with `EXPERTS`, and are stacked by expert.
    """
    a = architecture
    width, head, attended = a.hidden_size, a.head_dim, a.num_heads * a.head_dim
    projected = attended + 2 * a.num_kv_heads * head
    found: dict[str, Shape] = {}
    if a.block != "post_norm":
        found |= _norm(a, "self_attention.linear_qkv.layer_norm_")
    found["self_attention.linear_qkv.weight"] = (projected, width)
    if a.bias is not None:
        found["self_attention.linear_qkv.bias"] = (projected,)
    if a.qk_norm is not None:
        whole = a.qk_norm == "full"
        found["self_attention.q_layernorm.weight"] = (attended if whole else head,)
        found["self_attention.k_layernorm.weight"] = (a.num_kv_heads * head if whole else head,)
    found["self_attention.linear_proj.weight"] = (width, attended)
    if a.bias == "all":
        found["self_attention.linear_proj.bias"] = (width,)
    if a.block in {"post_norm", "sandwich"}:
        found |= _norm(a, "post_attention_layernorm.")
    found |= _mlp_tensors(a)
    if a.block in {"post_norm", "sandwich"}:
        found |= _norm(a, "post_mlp_layernorm.")
    return found


def _mlp_tensors(a: Architecture) -> dict[str, Shape]:
    """The second half of a layer, with the norm before it."""
    width, inner = a.hidden_size, a.ffn_hidden_size
    outputs = 2 * inner if a.is_gated else inner
    if a.num_experts is not None:
        return {
            **_norm(a, "pre_mlp_layernorm."),
            "mlp.router.weight": (a.num_experts, width),
            EXPERTS + "linear_fc1.weight": (a.num_experts, outputs, width),
            EXPERTS + "linear_fc2.weight": (a.num_experts, width, inner),
        }
    has_norm = a.block in {"sequential", "parallel_two_norms", "sandwich"}
    found = _norm(a, "mlp.linear_fc1.layer_norm_") if has_norm else {}
    found["mlp.linear_fc1.weight"] = (outputs, width)
    if a.bias == "all":
        found["mlp.linear_fc1.bias"] = (outputs,)
    found["mlp.linear_fc2.weight"] = (width, inner)
    if a.bias == "all":
        found["mlp.linear_fc2.bias"] = (width,)
    return found


def iter_tensors(
    architecture: Architecture, rows: int
) -> Iterator[tuple[str, tuple[int, ...], Shape]]:
    """What checkpoints stack, one by one and layer by layer: name, then layer and expert if it has them, shape.

    Args:
        architecture: The model's.
        rows: Rows of the embedding.
    """
    for key, shape in outer_tensor_shapes(architecture, rows).items():
        yield key, (), shape
    for layer in range(architecture.num_layers):
        for key, shape in layer_tensor_shapes(architecture).items():
            if key.startswith(EXPERTS):
                for expert in range(shape[0]):
                    yield LAYERS + key, (layer, expert), shape[1:]
            else:
                yield LAYERS + key, (layer,), shape


def is_sharded(architecture: Architecture, name: str) -> bool:
    """Whether each tensor-parallel rank has its own part of a tensor, rather than all of it."""
    if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return architecture.qk_norm == "full"
    return name.endswith(CUT)


def num_elements(tensors: dict[str, Shape]) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in tensors.values())


def _norm(architecture: Architecture, prefix: str) -> dict[str, Shape]:
    parts = ("weight", "bias") if architecture.norm_bias else ("weight",)
    return {prefix + part: (architecture.hidden_size,) for part in parts}
