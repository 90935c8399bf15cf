"""Import of a Hugging Face folder's weights into this rank's shards, one slice of a tensor at a time."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ul2r.config import Architecture
from ul2r.config.training import NewEmbeddings
from ul2r.model.build import iter_shards
from ul2r.model.huggingface.family import TensorSlice, is_embedding, slice_tensor
from ul2r.model.huggingface.new_embeddings import draw_rows, list_rare_subwords
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader

ROWS_PER_BLOCK = 4096
"""Rows of an embedding that are read at a time to compute its mean."""


@torch.no_grad()
def load_weights(
    model: GPTModel,
    reader: SafetensorsReader,
    architecture: Architecture,
    new_embeddings: NewEmbeddings = "mean",
    seed: int = 0,
) -> None:
    """Fill a model of any layout; of each tensor only this rank's part is read, and no other copy is kept.

    Args:
        model: This rank's part.
        reader: The folder.
        architecture: The folder's model.
        new_embeddings: First values of rows of the embedding beyond those in the folder, for new tokens or padding.
        seed: Of the noise in them.

    Raises:
        CheckpointError: If they are to be those of rare subwords, and the folder has no tokenizer.
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
            # New rows by their number, from 0, so that they do not depend on the layout.
            first = start + num_filled - num_embeddings
            numbers = range(first, first + len(shard.data) - num_filled)
            shard.data[num_filled:] = _make_new_rows(
                reader,
                slices[0],
                columns,
                numbers=numbers,
                new_embeddings=new_embeddings,
                seed=f"{seed}/{shard.key}",
            )


def _make_new_rows(
    reader: SafetensorsReader,
    part: TensorSlice,
    columns: slice,
    *,
    numbers: range,
    new_embeddings: NewEmbeddings,
    seed: str,
) -> Tensor:
    """Return first values of new rows, or of one row that stands for all of them."""
    if new_embeddings == "rare_subwords":
        rare = list_rare_subwords(reader.folder)
        sources = [rare[number % len(rare)] for number in numbers]
        return torch.cat([reader.read_rows(part, row, row + 1, columns) for row in sources])
    mean, std = _compute_moments(reader, part, columns)
    return mean if new_embeddings == "mean" else draw_rows(mean, std, seed, numbers)


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


def _compute_moments(
    reader: SafetensorsReader, part: TensorSlice, columns: slice
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, float64."""
    # float64, since a vocabulary has hundreds of thousands of rows to add up.
    total, squares = torch.zeros(2, columns.stop - columns.start, dtype=torch.float64)
    for first in range(0, len(part), ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, len(part))
        rows = reader.read_rows(part, first, last, columns)
        total += rows.sum(0, dtype=torch.float64)
        squares += rows.double().square().sum(0)
    mean = total / len(part)
    return mean, (squares / len(part) - mean.square()).clamp(min=0).sqrt()
