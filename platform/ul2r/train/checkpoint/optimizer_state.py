"""The optimizer's state in a checkpoint: each rank's own part, described as boxes of the whole tensors.

The distributed optimizer (ZeRO, arXiv 1910.02054, 5.1) splits the parameters that replicas share into equal ranges of
elements, regardless of where tensors begin and end. To save that independently of the layout, Megatron-Core lets every
replica gather all of it in host memory first. But a range of a matrix's elements is at most three boxes: the end of a
row, whole rows, the beginning of a row. A rank can write and read its boxes without any other rank, under any layout.

The ranges and the states by parameter are private to Megatron-Core's DistributedOptimizer (0.16);
tests/distributed/test_optimizer_state.py compares the boxes with what Megatron-Core gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from ul2r.train.optimizer import iter_owned_ranges, unwrap_chained_optimizer

STATE_KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Weights in fp32, and AdamW's two moments. Its step count is a setting here: it is the same for all parameters."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size along each axis."""


def shard_optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Describe this rank's part of the optimizer's state, to be saved or to be loaded into.

    Args:
        optimizer: The distributed optimizer.
        model: Sharded state of the same parameters, from `build.make_sharded_state_dict`.

    Returns:
        The optimizer's settings, and under `pieces` sharded tensors that share memory with the optimizer's own. Keys
        and global shapes are those of Megatron-Core's `fully_reshardable` checkpoints.
    """
    distributed = unwrap_chained_optimizer(optimizer)
    shards = {shard.data: shard for shard in nested_values(model)}

    pieces: list[ShardedTensor] = []
    for parameter, owned in iter_owned_ranges(distributed):
        # Fp32 weights and moments of the owned range only, flattened.
        states = distributed._get_main_param_and_optimizer_states(parameter)
        for kind, values in states.items():
            if kind in STATE_KINDS:
                prefix = f"optimizer.state.{kind}"
                pieces += _shard_range(shards[parameter], prefix, values, owned.start)
    return {**distributed.state_dict(), "pieces": pieces}


def split_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Split a range of a tensor's elements into as few boxes as possible, in the order of the elements.

    Elements 2 to 9 of a tensor of shape (3, 4):

        .  .  2  3      end of a row         offset (0, 2), size (1, 2)
        4  5  6  7      whole rows           offset (1, 0), size (1, 4)
        8  9  .  .      beginning of a row   offset (2, 0), size (1, 2)

    Args:
        shape: Of a contiguous tensor.
        start: First element.
        stop: One past the last element.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return

    row_size = prod(shape[1:])
    first_whole = -(-start // row_size)
    end_whole = stop // row_size
    if first_whole > end_whole:
        # The range lies within one row.
        yield from _split_row(shape, end_whole, start, stop)
        return

    if start < first_whole * row_size:
        yield from _split_row(shape, first_whole - 1, start, first_whole * row_size)
    if first_whole < end_whole:
        offset = (first_whole, *[0] * (len(shape) - 1))
        yield offset, (end_whole - first_whole, *shape[1:])
    if end_whole * row_size < stop:
        yield from _split_row(shape, end_whole, end_whole * row_size, stop)


def _split_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    """Split a range of elements within one row, counted from the start of the tensor."""
    row_start = row * prod(shape[1:])
    for offset, size in split_into_boxes(shape[1:], start - row_start, stop - row_start):
        yield (row, *offset), (1, *size)


def _shard_range(
    shard: ShardedTensor | ShardedTensorFactory, prefix: str, values: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Describe values of a range of a parameter's elements as boxes of the global tensors that it belongs to.

    Args:
        shard: This rank's shard of the parameter.
        prefix: Of the keys.
        values: (elements), contiguous.
        start: Position of the first one in the flattened parameter.
    """
    # On the meta device: only the shapes and offsets that a factory gives its parts are of interest.
    outline = replace(shard, data=torch.empty_like(shard.data, device="meta"))
    leaves = outline.build() if isinstance(outline, ShardedTensorFactory) else [outline]

    for leaf in nested_values(leaves):
        # A factory splits by rows, such as the gate and linear parts of an MLP: each leaf is a range as well.
        leaf_start = leaf.data.storage_offset()
        first = max(start, leaf_start)
        end = min(start + len(values), leaf_start + leaf.data.numel())
        if first >= end:
            continue

        position = first - start
        for offset, size in split_into_boxes(
            leaf.local_shape, first - leaf_start, end - leaf_start
        ):
            box = values[position : position + prod(size)]
            position += len(box)
            yield _shard_box(leaf, f"{prefix}.{leaf.key}", box, offset, size)


def _shard_box(
    leaf: ShardedTensor, key: str, values: Tensor, offset: tuple[int, ...], size: tuple[int, ...]
) -> ShardedTensor:
    """Describe values of one box of a shard as a shard of the same global tensor."""
    # Stacked layers: the global tensor has leading axes, such as the layer, that local shapes do not.
    num_prepended = leaf.prepend_axis_num
    shape = (*[1] * num_prepended, *size)
    within = zip(leaf.global_offset[num_prepended:], offset, strict=True)
    global_offset = (*leaf.global_offset[:num_prepended], *(a + b for a, b in within))

    return ShardedTensor(
        key=key,
        data=values.view(shape),
        dtype=values.dtype,
        local_shape=shape,
        global_shape=leaf.global_shape,
        global_offset=global_offset,
        # None marks an irregular grid of shards; otherwise offsets would have to be multiples of the shape.
        axis_fragmentations=None,
        # The last number counts data-parallel replicas: of this box there is only this one.
        replica_id=(*leaf.replica_id[:-1], 0),
        allow_shape_mismatch=leaf.allow_shape_mismatch,
    )
