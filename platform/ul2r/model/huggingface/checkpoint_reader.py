"""Reading of a distributed checkpoint without Megatron-Core, as memory-mapped pages of its files."""

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
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ul2r.config import Architecture
from ul2r.errors import CheckpointError
from ul2r.model.huggingface.family import is_embedding
from ul2r.model.restricted_reader import METADATA_FILE, RestrictedReader
from ul2r.model.tensors import LAYERS, layer_tensor_shapes, outer_tensor_shapes
from ul2r.paths import is_file_name

BLOCK_BYTES = 8 * 2**20
"""Largest block that is assembled from several chunks at a time."""
LIBC = CDLL(None)
MADV_POPULATE_READ = 22
"""Linux's constant, which Python's mmap module does not define."""
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Begin the names of a GPT model's tensors in Megatron-Core; those of the optimizer's state begin otherwise."""


@dataclass(frozen=True)
class StoredChunk:
    """Rectangle of a tensor that is stored contiguously.

    Attributes:
        row: First row in the tensor.
        column: First column in the tensor.
        num_rows: Rows of the chunk.
        view: Returns its values as a view of the file's pages.
    """

    row: int
    column: int
    num_rows: int
    view: Callable[[], Tensor]

    def has_rows(self, first: int, end: int) -> bool:
        """Return whether the chunk spans rows [first, end) of the tensor, in some or all columns."""
        return self.row <= first and end <= self.row + self.num_rows


@dataclass(frozen=True)
class StoredTensor:
    """Tensor as stored in a checkpoint.

    Attributes:
        shape: Shape of the whole tensor.
        chunks: Its chunks, in any order.
    """

    shape: tuple[int, ...]
    chunks: list[StoredChunk]

    def iter_rows(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield rows [start, stop) in blocks: a view where one chunk has whole rows, else copies of `BLOCK_BYTES`."""
        chunks = sorted(self.chunks, key=lambda chunk: chunk.column)
        edges = {edge for chunk in chunks for edge in (chunk.row, chunk.row + chunk.num_rows)}
        bounds = [start, *sorted(edge for edge in edges if start < edge < stop), stop]

        # Between two neighboring edges, every chunk has all of the rows or none.
        for first, end in pairwise(bounds):
            views = [
                chunk.view()[first - chunk.row : end - chunk.row]
                for chunk in chunks
                if chunk.has_rows(first, end)
            ]
            if len(views) == 1:
                yield views[0]
                continue

            num_rows = max(BLOCK_BYTES // sum(view[0].nbytes for view in views), 1)
            for begin in range(0, end - first, num_rows):
                yield torch.cat([view[begin : begin + num_rows] for view in views], dim=1)


def concat_blocks(blocks: list[Tensor]) -> Tensor:
    """Concatenate blocks of rows; a single block is returned without a copy."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


class MegatronCheckpointReader:
    """Model tensors of a distributed checkpoint of any layout; optimizer state is ignored.

    Megatron-Core's `torch_dist` format is torch's own distributed checkpoint, which needs no process group to read.

    Args:
        checkpoint: Folder written by `save_checkpoint` or by another user of Megatron-Core.

    Raises:
        CheckpointError: If it holds no such checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint
        self._reader = RestrictedReader(checkpoint)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint} is not a distributed checkpoint: {error}"
            ) from None
        # Sets `storage_data`, the place of each chunk in the files, which `_map_item` reads.
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: found
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def check(self, architecture: Architecture, num_embeddings: int = 0) -> None:
        """Refuse a checkpoint of another model; its embedding may be padded to any number of rows.

        Args:
            architecture: The expected model.
            num_embeddings: Fewest rows of the embedding.

        Raises:
            CheckpointError: Naming the first tensor that is missing, has another shape or would be left out.
        """
        expected = outer_tensor_shapes(architecture, num_embeddings)
        for key, shape in layer_tensor_shapes(architecture).items():
            # Checkpoints stack a tensor of all layers into one.
            expected[LAYERS + key] = (architecture.num_layers, *shape)

        for key, shape in expected.items():
            found = self._tensors.get(key)
            if found is None:
                raise CheckpointError(
                    f"{self.folder} has no tensor {key}, which the recipe's model has: change model"
                )
            size = tuple(found.size)
            is_padded = is_embedding(key) and size[0] >= num_embeddings and size[1:] == shape[1:]
            if size != shape and not is_padded:
                raise CheckpointError(
                    f"{self.folder}: {key} has shape {size}, but {shape} in the recipe's model: change model"
                )

        for key in self._tensors:
            # TransformerEngine's scaling factors are no weights.
            is_weight = key.startswith(MODEL_PREFIXES) and not key.endswith("_extra_state")
            if is_weight and key not in expected:
                raise CheckpointError(
                    f"{self.folder} has a tensor {key}, which the recipe's model lacks: change model"
                )

    def num_rows(self, key: str) -> int:
        """Return the length of a tensor's first axis."""
        return int(self._tensors[key].size[0])

    def dtype_of(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        dtype: torch.dtype = self._find(key).properties.dtype
        return dtype

    def open_tensor(self, key: str, index: tuple[int, ...]) -> StoredTensor:
        """Locate one tensor's chunks.

        Args:
            key: Megatron's name.
            index: Layer, or layer and expert, for tensors that are stacked by them; else empty.
        """
        found = self._find(key)
        num_axes = len(index)
        shape = found.size[num_axes:]
        offsets = torch.Size([*index, *[0] * len(shape)])

        # torch's planner finds the stored chunks that overlap a requested one, which here is the whole tensor.
        requested = ChunkStorageMetadata(offsets, torch.Size([*[1] * num_axes, *shape]))
        items = create_read_items_for_chunk_list(key, found, [requested])
        return StoredTensor(shape, [self._make_chunk(item, num_axes) for item in items])

    def read_tensor(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a whole tensor; arguments as for `open_tensor`."""
        tensor = self.open_tensor(key, index)
        return concat_blocks(list(tensor.iter_rows(0, tensor.shape[0])))

    def _find(self, key: str) -> TensorStorageMetadata:
        found = self._tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.folder} has no tensor {key}, which its model should have")
        return found

    def _make_chunk(self, item: ReadItem, num_axes: int) -> StoredChunk:
        """Make a chunk of what the planner found, whose first `num_axes` axes all have length 1."""
        row, column, *_ = *item.dest_offsets[num_axes:], 0  # a vector has no column
        # Cached, since a chunk's rows are read in several ranges; the mapping is freed with the chunk.
        view = cache(lambda: self._map_item(item).flatten(0, num_axes))
        return StoredChunk(row, column, item.lengths[num_axes], view)

    def _map_item(self, item: ReadItem) -> Tensor:
        """Map a stored tensor's values into memory: pages of the file, no memory of the process."""
        place = self._reader.storage_data[item.storage_index]
        with (self.folder / place.relative_path).open("rb") as file:
            # A checkpoint's file is a sequence of torch.save archives, each an uncompressed zip that stores the
            # values of its only tensor in the record data/0. Loading it to "meta" yields dtype, shape and strides
            # without the values. _slice_file and PyTorchFileReader are private to torch.
            saved = self._reader._slice_file(file, place)
            outline = torch.load(saved, map_location="meta", weights_only=True)
            saved.seek(0)
            archive: Any = torch._C.PyTorchFileReader(saved)
            begin = place.offset + archive.get_record_offset("data/0")
            size = outline.untyped_storage().nbytes()
            pages = _map_bytes(file, begin, size)

        # Mapped pages begin at a page boundary before the record: the values are their last `size` bytes.
        storage = pages.untyped_storage()[pages.nbytes - size :]
        whole = torch.empty(0, dtype=outline.dtype).set_(
            storage, outline.storage_offset(), outline.shape, outline.stride()
        )
        bounds = zip(item.storage_offsets, item.lengths, strict=True)
        return whole[tuple(slice(start, start + length) for start, length in bounds)]


def compute_foreign_identity(checkpoint: Path) -> str:
    """Return a digest of the tensor metadata of a checkpoint that was not written by this project."""
    return "megatron-" + hashlib.sha256((checkpoint / METADATA_FILE).read_bytes()).hexdigest()[:23]


def find_latest_iteration(folder: Path, setting: str = "base.megatron") -> Path:
    """Return the latest checkpoint in a Megatron-LM folder, or the folder itself if it is a checkpoint.

    Args:
        folder: The folder.
        setting: The setting that names it, for messages.

    Raises:
        CheckpointError: If there is none, or it has another format than `torch_dist`.
    """
    pointer = folder / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        iteration = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not is_file_name(iteration):
            raise CheckpointError(
                f"{pointer}: names {iteration[:80]!r}, which is not a folder next to it: "
                f"set {setting} to the folder of a checkpoint"
            )
        # Megatron-LM writes a number, or "release" for weights without optimizer state.
        folder /= f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration

    if not (folder / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{setting}={folder} has no {METADATA_FILE}, so it is not a torch_dist checkpoint: "
            "point to the folder of one, or convert it with Megatron-LM's tools"
        )
    return folder


def _map_bytes(file: BinaryIO, begin: int, size: int) -> Tensor:
    """Map a file's pages that contain bytes [begin, begin + size), as uint8; they end with the last byte."""
    before = begin % ALLOCATIONGRANULARITY

    # ACCESS_COPY, since torch.frombuffer warns of memory that cannot be written. The mapping lives as long as a view.
    mapping = mmap(file.fileno(), before + size, access=ACCESS_COPY, offset=begin - before)
    pages = torch.frombuffer(mapping, dtype=torch.uint8)

    # Reads all pages at once; through ctypes, which releases the GIL, unlike mmap.madvise. Kernels before 5.14
    # refuse the advice and read page by page.
    LIBC.madvise(c_void_p(pages.data_ptr()), c_size_t(pages.nbytes), MADV_POPULATE_READ)
    return pages
