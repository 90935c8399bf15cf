"""Import of a Hugging Face folder's weights into this rank's shards, one slice of a tensor at a time."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ul2r.config import Architecture
from ul2r.model.build import iter_shards
from ul2r.model.huggingface.family import TensorSlice, is_embedding, slice_tensor
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader

ROWS_PER_BLOCK = 4096
"""Rows of an embedding that are read at a time to compute its mean."""


@torch.no_grad()
def load_weights(model: GPTModel, reader: SafetensorsReader, architecture: Architecture) -> None:
    """Fill a model of any layout; of each tensor only this rank's part is read, and no other copy is kept.

    Rows of the embedding beyond those in the folder, for new tokens or padding, become the mean of its rows.

    Args:
        model: This rank's part.
        reader: The folder.
        architecture: The folder's model.
    """
    num_embeddings = architecture.num_embeddings
    assert num_embeddings is not None
    for shard in iter_shards(model):
        # Leading axes that the shard's own shape does not have: the layer, and for experts the expert.
        num_axes = shard.prepend_axis_num
        index = shard.global_offset[:num_axes]
        slices = slice_tensor(reader.family, architecture, shard.key, index, num_embeddings)
        start, *other = shard.global_offset[num_axes:]
        # Row-parallel matrices are split by columns; a rank reads only its own from the file.
        columns = slice(other[0], other[0] + shard.local_shape[1]) if other else None

        num_filled = _fill_rows(shard.data, reader, slices, start, columns)
        if num_filled < len(shard.data):
            assert is_embedding(shard.key), f"{shard.key} has rows that {reader.folder} lacks"
            assert columns is not None
            shard.data[num_filled:] = _compute_mean(reader, slices[0], columns)


def _fill_rows(
    data: Tensor,
    reader: SafetensorsReader,
    slices: tuple[TensorSlice, ...],
    start: int,
    columns: slice | None,
) -> int:
    """Copy rows from `start` on of the stacked slices into `data`; return how many there were."""
    first_row = 0
    num_filled = 0
    for part in slices:
        # The part is rows [first_row, first_row + len(part)) of Megatron's tensor: copy where that meets this rank's
        # rows.
        first = max(start, first_row)
        last = min(start + len(data), first_row + len(part))
        if first < last:
            rows = reader.read_rows(part, first - first_row, last - first_row, columns)
            data[first - start : last - start].copy_(rows)
            num_filled = last - start
        first_row += len(part)
    return num_filled


def _compute_mean(reader: SafetensorsReader, part: TensorSlice, columns: slice) -> Tensor:
    # float64, since a vocabulary has hundreds of thousands of rows to add up.
    total = torch.zeros(columns.stop - columns.start, dtype=torch.float64)
    for first in range(0, len(part), ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, len(part))
        total += reader.read_rows(part, first, last, columns).sum(0, dtype=torch.float64)
    return total / len(part)
