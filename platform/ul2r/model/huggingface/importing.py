"""Weights of a Hugging Face folder into this rank's shard of a model, a slice of a tensor at a time."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ul2r.config import Architecture
from ul2r.model.build import iter_shards
from ul2r.model.huggingface.family import TensorSlice, is_embedding, slice_tensor
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader

ROWS_AT_ONCE = 4096
"""Of an embedding, when its mean is taken."""


@torch.no_grad()
def load_weights(model: GPTModel, source: SafetensorsReader, architecture: Architecture) -> None:
    """Fill a model of any layout; only what this rank has of each tensor is read, and kept nowhere else.

    Rows of the embedding beyond the source's, for new tokens or padding, become the mean of those that there are.

    Args:
        model: This rank's part.
        source: The folder.
        architecture: The source's.
    """
    rows = architecture.num_embeddings
    assert rows is not None
    for shard in iter_shards(model):
        axes = shard.prepend_axis_num
        place = shard.global_offset[:axes]
        parts = slice_tensor(source.family, architecture, shard.key, place, rows)
        start, *other = shard.global_offset[axes:]
        columns = slice(other[0], other[0] + shard.local_shape[1]) if other else None
        filled = _fill(shard.data, source, parts, start, columns)
        if filled < len(shard.data):
            assert is_embedding(shard.key), f"{shard.key} has rows that {source.folder} lacks"
            assert columns is not None
            shard.data[filled:] = _mean(source, parts[0], columns)


def _fill(
    data: Tensor, source: SafetensorsReader, parts: tuple[TensorSlice, ...], start: int, columns: slice | None
) -> int:
    """Copy rows `start` and on of the parts into `data`; how many of its rows there were."""
    begin = filled = 0
    for part in parts:
        first, last = max(start, begin), min(start + len(data), begin + len(part))
        if first < last:
            read = source.read(part, first - begin, last - begin, columns)
            data[first - start : last - start].copy_(read)
            filled = last - start
        begin += len(part)
    return filled


def _mean(source: SafetensorsReader, part: TensorSlice, columns: slice) -> Tensor:
    total = torch.zeros(columns.stop - columns.start, dtype=torch.float64)
    for first in range(0, len(part), ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, len(part))
        total += source.read(part, first, last, columns).sum(0, dtype=torch.float64)
    return total / len(part)


def shard_bytes(model: GPTModel) -> int:
    """Bytes of this rank's weights."""
    return sum(_nbytes(shard) for shard in iter_shards(model))


def _nbytes(shard: ShardedTensor) -> int:
    return int(shard.data.nbytes)
