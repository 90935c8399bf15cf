"""What a family's table says, and which rows of its tensors make one of Megatron-Core's."""

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
    """How models of one of Hugging Face's classes are described and named.

    Attributes:
        model_class: The class that loads it.
        sizes: From a setting of `Architecture` to the key in config.json that is the same.
        choices: From a key in config.json to the values of it that are understood, each with the settings of
            `Architecture` that it stands for. Any other value is refused.
        always: Settings of `Architecture` that all models of the family have.
        outer: From Megatron's names of tensors outside of layers to the family's.
        inner: From Megatron's names of a layer's tensors, without "weight" or "bias", to the family's: one name, or
            those of the tensors that Megatron keeps in one; `{}` for the number of the expert.
        layer: What stands before `inner` names, `{}` for the number of the layer.
        base: What stands before all names but that of the output matrix, and may be left out in a file.
        output: Name of the output matrix where it is not the embedding.
        qkv: Whether queries, keys and values are tensors of their own; one with all queries, then all keys, then all
            values; or one as Megatron has it, by key/value head.
        transposed: Whether matrices of layers are stored as (inputs, outputs).
        local_layers: Whether layers are of two kinds, named in `layer_types`, with rotary positions for each.
        left_over: Ends of names that old files hold and nobody reads.
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
    qkv: Literal["apart", "one after the other", "by head"] = "apart"
    transposed: bool = False
    local_layers: bool = False
    left_over: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))


@dataclass(frozen=True)
class TensorSlice:
    """Rows of a family's tensor (its columns, if `transposed`), in Megatron's order."""

    name: str
    start: int
    stop: int
    transposed: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


def slice_tensor(
    family: Family, architecture: Architecture, key: str, place: tuple[int, ...], rows: int
) -> tuple[TensorSlice, ...]:
    """The parts that, one below the other, are one of Megatron's tensors.

    Args:
        family: The table.
        architecture: Sizes.
        key: Megatron's name.
        place: Numbers of the layer and of the expert, from 0, as far as there are any.
        rows: Rows of the embedding in the family's tensors; Megatron's may have more.
    """
    if not place:
        name = family.output if key == OUTPUT else family.base + family.outer[key]
        return (TensorSlice(name, 0, outer_tensor_shapes(architecture, rows)[key][0]),)
    inner = key.removeprefix(LAYERS)
    layer, *expert = place
    shape = layer_tensor_shapes(architecture)[inner][len(expert) :]
    kind = "bias" if inner.endswith("bias") else "weight"
    stem = inner.removesuffix(kind)
    names = family.inner[stem]
    full = [
        family.base + family.layer.format(layer) + name.format(*expert) + kind
        for name in ((names,) if isinstance(names, str) else names)
    ]
    transposed = family.transposed and len(shape) > 1
    if stem == "self_attention.linear_qkv." and family.qkv != "by head":
        return _by_group(full, architecture, transposed=transposed)
    share = shape[0] // len(full)
    return tuple(TensorSlice(name, 0, share, transposed) for name in full)


def _by_group(
    names: list[str], architecture: Architecture, *, transposed: bool
) -> tuple[TensorSlice, ...]:
    """Queries, keys and values as Megatron wants them: those of each key/value head side by side."""
    groups, head = architecture.num_kv_heads, architecture.head_dim
    queries = architecture.num_heads // groups * head
    query, key, value = names if len(names) == 3 else names * 3
    keys_at, values_at = 0, 0
    if len(names) == 1:
        keys_at = groups * queries
        values_at = keys_at + groups * head
    parts = []
    for group in range(groups):
        for name, start, width in (
            (query, group * queries, queries),
            (key, keys_at + group * head, head),
            (value, values_at + group * head, head),
        ):
            parts.append(TensorSlice(name, start, start + width, transposed))
    return tuple(parts)


def tensor_shapes(
    family: Family, architecture: Architecture, rows: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of the family must hold, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, place, shape in iter_tensors(architecture, rows):
        for part in slice_tensor(family, architecture, key, place, rows):
            before = shapes.get(part.name, (0, 0))[1 if part.transposed else 0]
            stop = max(before, part.stop)
            shapes[part.name] = (shape[1], stop) if part.transposed else (stop, *shape[1:])
    return shapes


def is_embedding(key: str) -> bool:
    """Whether a tensor has a row for each entry of the vocabulary."""
    return key in {EMBEDDING, OUTPUT}
