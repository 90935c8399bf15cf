"""A distributed checkpoint read without Megatron-Core, where it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from ctypes import CDLL, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ul2r.config import Architecture
from ul2r.errors import CheckpointError
from ul2r.model.huggingface.family import is_embedding
from ul2r.model.tensors import LAYERS, layer_tensors, outer_tensors

METADATA = ".metadata"
"""What every `torch_dist` checkpoint has: torch's own description of it."""
BLOCK_BYTES = 8 * 2**20
"""What is put together at once of rows that lie in several pieces."""
LIBC = CDLL(None)
MADV_POPULATE_READ = 22
"""Of Linux, which Python has no name for."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is stored as one.

    Attributes:
        row: Where it begins in the tensor.
        column: Likewise.
        length: Its rows.
        view: Gives its numbers where they lie.
    """

    row: int
    column: int
    length: int
    view: Callable[[], Tensor]

    def holds(self, first: int, last: int) -> bool:
        """Whether it has these rows of the tensor, or some columns of them."""
        return self.row <= first and last <= self.row + self.length


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a checkpoint.

    Attributes:
        shape: Of the whole.
        pieces: In any order.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]

    def rows(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows `start` to `stop`, some at a time: views where a piece has whole rows, else copies of few."""
        pieces = sorted(self.pieces, key=lambda piece: piece.column)
        edges = {edge for piece in pieces for edge in (piece.row, piece.row + piece.length)}
        cuts = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
        for first, last in pairwise(cuts):
            beside = [
                piece.view()[first - piece.row : last - piece.row]
                for piece in pieces
                if piece.holds(first, last)
            ]
            if len(beside) == 1:
                yield beside[0]
                continue
            at_once = max(BLOCK_BYTES // sum(view[0].nbytes for view in beside), 1)
            for begin in range(0, last - first, at_once):
                yield torch.cat([view[begin : begin + at_once] for view in beside], dim=1)


def joined(blocks: list[Tensor]) -> Tensor:
    """Rows below each other; a copy if there are several blocks."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


class MegatronCheckpointReader:
    """The model's tensors in a distributed checkpoint of any layout; optimizer state is not looked at.

    Megatron-Core's `torch_dist` format is torch's own distributed checkpoint, which needs no process group.

    Args:
        checkpoint: Folder that `save_checkpoint`, or another user of Megatron-Core, wrote.

    Raises:
        CheckpointError: If it holds no such checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint
        self._reader = FileSystemReader(checkpoint)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise CheckpointError(f"{checkpoint}: is no distributed checkpoint: {error}") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: found
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def check(self, architecture: Architecture, rows: int = 0) -> None:
        """Refuse a checkpoint of another model; its embedding may be padded to any number of rows.

        Args:
            architecture: The model's.
            rows: Fewest rows of the embedding.

        Raises:
            CheckpointError: Naming the first tensor that is missing or has another shape.
        """
        wanted = outer_tensors(architecture, rows)
        stacked = layer_tensors(architecture).items()
        wanted |= {LAYERS + key: (architecture.num_layers, *shape) for key, shape in stacked}
        for key, shape in wanted.items():
            found = self._tensors.get(key)
            if found is None:
                raise CheckpointError(
                    f"{self.folder}: has no tensor {key}, which the recipe's model has"
                )
            size = tuple(found.size)
            padded = is_embedding(key) and size[0] >= rows and size[1:] == shape[1:]
            if size != shape and not padded:
                raise CheckpointError(
                    f"{self.folder}: {key} has shape {size}, the recipe's model makes it {shape}: change model"
                )

    def rows(self, key: str) -> int:
        """Length of a tensor's first axis."""
        return int(self._tensors[key].size[0])

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        dtype: torch.dtype = self._find(key).properties.dtype
        return dtype

    def open(self, key: str, place: tuple[int, ...]) -> StoredTensor:
        """One tensor; `place` picks a layer, or a layer's expert, from those that are stored as one."""
        found, axes = self._find(key), len(place)
        sizes = found.size[axes:]
        offsets = torch.Size([*place, *[0] * len(sizes)])
        chunk = ChunkStorageMetadata(offsets, torch.Size([*[1] * axes, *sizes]))
        items = create_read_items_for_chunk_list(key, found, [chunk])
        return StoredTensor(sizes, [self._piece(item, axes) for item in items])

    def read(self, key: str, place: tuple[int, ...] = ()) -> Tensor:
        """All of one tensor, as `open` has it."""
        tensor = self.open(key, place)
        return joined(list(tensor.rows(0, tensor.shape[0])))

    def _find(self, key: str) -> TensorStorageMetadata:
        found = self._tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.folder}: has no tensor {key}, which its model has")
        return found

    def _piece(self, item: ReadItem, axes: int) -> Piece:
        """What is asked for of something stored.

        Args:
            item: Names it.
            axes: Axes before the rows, all of length one.
        """
        row, column, *_ = *item.dest_offsets[axes:], 0
        view = cache(lambda: self._view(item).flatten(0, axes))
        return Piece(row, column, item.lengths[axes], view)

    def _view(self, item: ReadItem) -> Tensor:
        """Numbers somewhere in what torch.save wrote somewhere into a file; pages of it, no memory of the process."""
        place = self._reader.storage_data[item.storage_index]
        with (self.folder / place.relative_path).open("rb") as file:
            saved = self._reader._slice_file(file, place)
            outline = torch.load(saved, map_location="meta", weights_only=True)
            saved.seek(0)
            archive: Any = torch._C.PyTorchFileReader(saved)
            begin = place.offset + archive.get_record_offset("data/0")
            size = outline.untyped_storage().nbytes()
            numbers = _mapped(file, begin, size)
        storage = numbers.untyped_storage()[numbers.nbytes - size :]
        whole = torch.empty(0, dtype=outline.dtype).set_(
            storage, outline.storage_offset(), outline.shape, outline.stride()
        )
        bounds = zip(item.storage_offsets, item.lengths, strict=True)
        return whole[tuple(slice(start, start + length) for start, length in bounds)]


def foreign_identity(checkpoint: Path) -> str:
    """Digest of what a checkpoint that is not this project's says of its tensors."""
    return "megatron-" + hashlib.sha256((checkpoint / METADATA).read_bytes()).hexdigest()[:23]


def latest_iteration(folder: Path, setting: str = "base.megatron") -> Path:
    """The checkpoint in a folder of Megatron-LM's, or the folder itself if it is one.

    Args:
        folder: The folder.
        setting: What names it.

    Raises:
        CheckpointError: If there is none, or it is of another format than `torch_dist`.
    """
    pointer = folder / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        iteration = pointer.read_text(encoding="utf-8").strip()
        named = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        folder = folder / named
    if not (folder / METADATA).is_file():
        raise CheckpointError(
            f"{setting}={folder}: holds no {METADATA}, so it is no torch_dist checkpoint: name the folder of one, "
            "or convert it with Megatron-LM's tools"
        )
    return folder


def _mapped(file: BinaryIO, begin: int, size: int) -> Tensor:
    """Pages of a file up to the end of some bytes, as uint8; unmapped with the last view of them."""
    before = begin % ALLOCATIONGRANULARITY
    pages = mmap(file.fileno(), before + size, access=ACCESS_COPY, offset=begin - before)
    numbers = torch.frombuffer(pages, dtype=torch.uint8)
    # All at once, and without Python's lock, unlike mmap.madvise. Kernels before 5.14 refuse: they map page by page.
    LIBC.madvise(c_void_p(numbers.data_ptr()), c_size_t(numbers.nbytes), MADV_POPULATE_READ)
    return numbers
