"""The optimizer's state in a checkpoint: each rank's own part of it, where it belongs in the whole tensors.

The distributed optimizer (ZeRO, arXiv 1910.02054, 5.1) cuts what replicas share into equal runs of numbers, wherever
tensors begin and end. Megatron-Core's way of saving that independently of the layout has every replica gather all of
it in host memory first. But a run of a matrix's numbers is at most three boxes: the end of a row, whole rows, the
beginning of a row. Boxes need no other rank, neither to be written nor to be read, under any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Of state: weights in fp32, and AdamW's two moments."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size, axis by axis."""


def shard_optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of the optimizer's state, to be saved or to be loaded into.

    Args:
        optimizer: The distributed one.
        model: Of `build.make_sharded_state_dict`, of the same parameters.

    Returns:
        Its settings, and `pieces`, whose data are the optimizer's own tensors. Keys and whole shapes are those of
        Megatron-Core's `fully_reshardable` checkpoints.
    """
    part = unwrap_chained_optimizer(optimizer)
    described = {shard.data: shard for shard in nested_values(model)}
    pieces = [
        piece
        for parameter, numbers in _own_runs(part)
        for kind, tensor in part._get_main_param_and_optimizer_states(parameter).items()
        if kind in KINDS
        for piece in _pieces(described[parameter], f"optimizer.state.{kind}", tensor, numbers.start)
    ]
    return {**part.state_dict(), "pieces": pieces}


def unwrap_chained_optimizer(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    """Megatron-Core's chain of optimizers has one link here."""
    (part,) = optimizer.chained_optimizers
    return part


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut numbers `start` to `stop` of a tensor that is laid out row by row into as few boxes as hold them in order."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _within(shape, last, start, stop)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _within(shape, last, last * row, stop)


def _within(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    """The same of numbers of one row."""
    begin = row * prod(shape[1:])
    for offset, size in boxes(shape[1:], start - begin, stop - begin):
        yield (row, *offset), (1, *size)


def _own_runs(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """The parameters that this rank updates numbers of, and from which to which."""
    for by_dtype in part.gbuf_ranges:
        for bucket in chain.from_iterable(by_dtype.values()):
            for parameter, ranges in bucket["param_map"].items():
                yield parameter, ranges["param"]


def _pieces(
    shard: ShardedTensor | ShardedTensorFactory, prefix: str, run: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """A run of numbers from `start` of a parameter, flattened, as boxes of the whole tensors it is a part of."""
    outline = replace(shard, data=torch.empty_like(shard.data, device="meta"))
    leaves = outline.build() if isinstance(outline, ShardedTensorFactory) else [outline]
    for leaf in nested_values(leaves):
        begin = leaf.data.storage_offset()  # a factory cuts by rows: gate and linear part of an MLP
        first, last = max(start, begin), min(start + len(run), begin + leaf.data.numel())
        if first >= last:
            continue
        axes = leaf.prepend_axis_num
        at = first - start
        for offset, size in boxes(leaf.local_shape, first - begin, last - begin):
            numbers = run[at : at + prod(size)]
            at += len(numbers)
            shape = (*[1] * axes, *size)
            place = (
                *leaf.global_offset[:axes],
                *(a + b for a, b in zip(leaf.global_offset[axes:], offset, strict=True)),
            )
            yield ShardedTensor(
                key=f"{prefix}.{leaf.key}",
                data=numbers.view(shape),
                dtype=numbers.dtype,
                local_shape=shape,
                global_shape=leaf.global_shape,
                global_offset=place,
                axis_fragmentations=None,
                replica_id=(*leaf.replica_id[:-1], 0),  # no other data-parallel rank has it
                allow_shape_mismatch=leaf.allow_shape_mismatch,
            )
