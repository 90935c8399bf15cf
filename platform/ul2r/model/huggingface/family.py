"""Table of a family, and the mapping from its tensors to Megatron-Core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ul2r.config import Architecture
from ul2r.model.tensors import (
    EMBEDDING,
    LAYERS,
    OUTPUT,
    iter_tensors,
    layer_tensor_shapes,
    outer_tensor_shapes,
)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Configuration keys and tensor names of one of Hugging Face's model classes.

    Attributes:
        model_class: The class that loads it.
        sizes: From settings of `Architecture` to the equivalent keys of config.json.
        choices: From keys of config.json to their supported values, each with the settings of `Architecture` that it
            stands for. Any other value is refused.
        always: Settings of `Architecture` that all models of the family share.
        outer: From Megatron's names of tensors outside of layers to the family's.
        inner: From Megatron's names of a layer's tensors, without "weight" or "bias", to the family's: one name, or the
            names of the tensors that Megatron fuses into one; `{}` stands for the number of the expert.
        layer: Prefix of `inner` names, `{}` for the number of the layer.
        base: Prefix of all names except the output matrix; some files omit it.
        output: Name of the output matrix if it is not tied to the embedding.
        qkv: Layout of queries, keys and values: a tensor each; one tensor with all queries, then all keys, then all
            values; or one grouped by key/value head, as Megatron's.
        transposed: True if layers store matrices as (inputs, outputs).
        local_layers: True if there are two kinds of layers, listed in `layer_types`, with rotary parameters each.
        partial_rotary: True if the class reads partial_rotary_factor; the others rotate whole heads.
        unused_suffixes: Ends of the names of tensors that old files contain and nothing reads.
    """

    model_class: str
    sizes: Mapping[str, str]
    choices: Mapping[str, tuple[tuple[Any, Settings], ...]]
    always: Settings
    outer: Mapping[str, str]
    inner: Mapping[str, str | tuple[str, ...]]
    layer: str = "layers.{}."
    base: str = "model."
    output: str = "lm_head.weight"
    qkv: Literal["separate", "concatenated", "by_group"] = "separate"
    transposed: bool = False
    local_layers: bool = False
    partial_rotary: bool = False
    unused_suffixes: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))


@dataclass(frozen=True)
class TensorSlice:
    """Rows [start, stop) of a family's tensor; its columns, if `transposed`."""

    name: str
    start: int
    stop: int
    transposed: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


def slice_tensor(
    family: Family,
    architecture: Architecture,
    key: str,
    index: tuple[int, ...],
    num_embeddings: int,
) -> tuple[TensorSlice, ...]:
    """Return the slices of the family's tensors that, stacked, are one of Megatron's tensors.

    Args:
        family: The table.
        architecture: The model.
        key: Megatron's name.
        index: Layer, or layer and expert, from 0; empty outside of layers.
        num_embeddings: Rows of the embedding in the family's tensors; Megatron's may have more.
    """
    if not index:
        name = family.output if key == OUTPUT else family.base + family.outer[key]
        return (TensorSlice(name, 0, outer_tensor_shapes(architecture, num_embeddings)[key][0]),)

    inner = key.removeprefix(LAYERS)
    layer, *expert = index
    shape = layer_tensor_shapes(architecture)[inner][len(expert) :]
    kind = "bias" if inner.endswith("bias") else "weight"
    stem = inner.removesuffix(kind)
    names = family.inner[stem]
    full_names = [
        family.base + family.layer.format(layer) + name.format(*expert) + kind
        for name in ((names,) if isinstance(names, str) else names)
    ]

    transposed = family.transposed and len(shape) > 1
    if stem == "self_attention.linear_qkv." and family.qkv != "by_group":
        return _slice_by_group(full_names, architecture, transposed=transposed)
    # Other fused tensors, the gate and the linear input of an MLP, have parts of equal length.
    num_rows = shape[0] // len(full_names)
    return tuple(TensorSlice(name, 0, num_rows, transposed) for name in full_names)


def _slice_by_group(
    names: list[str], architecture: Architecture, *, transposed: bool
) -> tuple[TensorSlice, ...]:
    """Order queries, keys and values as Megatron does: those of each key/value head next to each other.

    With one key/value head (group) per two queries: q0 q1 k0 v0, q2 q3 k1 v1, ...
    """
    num_groups = architecture.num_kv_heads
    head = architecture.head_dim
    queries = architecture.num_heads // num_groups * head
    # A concatenated matrix, such as GPT-2's, is one tensor: its name stands for all three parts.
    query, key, value = names if len(names) == 3 else names * 3

    first_key = 0
    first_value = 0
    if len(names) == 1:
        first_key = num_groups * queries
        first_value = first_key + num_groups * head

    slices = []
    for group in range(num_groups):
        for name, start, width in (
            (query, group * queries, queries),
            (key, first_key + group * head, head),
            (value, first_value + group * head, head),
        ):
            slices.append(TensorSlice(name, start, start + width, transposed))
    return tuple(slices)


def tensor_shapes(
    family: Family, architecture: Architecture, num_embeddings: int
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a file of the family must contain."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, index, shape in iter_tensors(architecture, num_embeddings):
        for part in slice_tensor(family, architecture, key, index, num_embeddings):
            # A tensor is as long as its last slice reaches: slices of one tensor may come from several places.
            length = shapes.get(part.name, (0, 0))[1 if part.transposed else 0]
            stop = max(length, part.stop)
            shapes[part.name] = (shape[1], stop) if part.transposed else (stop, *shape[1:])
    return shapes


def is_embedding(key: str) -> bool:
    """Return whether a tensor has a row for each entry of the vocabulary."""
    return key in {EMBEDDING, OUTPUT}
