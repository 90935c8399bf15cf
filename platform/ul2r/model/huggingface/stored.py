"""A distributed checkpoint read without Megatron-Core, a tensor at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ul2r.config import Architecture
from ul2r.errors import CheckpointError
from ul2r.model.huggingface.family import is_embedding
from ul2r.model.tensors import LAYERS, layer_tensors, outer_tensors

METADATA = ".metadata"
"""What every `torch_dist` checkpoint has: torch's own description of it."""


class Stored:
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
        wanted |= {LAYERS + key: (architecture.layers, *shape) for key, shape in stacked}
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

    def read(self, key: str, layer: int | None) -> Tensor:
        """One tensor; `layer` picks from those of all layers, which are stored as one."""
        found = self._tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.folder}: has no tensor {key}, which its model has")
        offsets, sizes = torch.Size([0] * len(found.size)), found.size
        if layer is not None:
            offsets, sizes = torch.Size([layer, *offsets[1:]]), torch.Size([1, *sizes[1:]])
        tensor = torch.empty(sizes, dtype=found.properties.dtype)
        items = create_read_items_for_chunk_list(key, found, [ChunkStorageMetadata(offsets, sizes)])
        self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor if layer is None else tensor[0]


class _Into(DefaultLoadPlanner):
    """Reads into one tensor, whatever it is called."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:  # noqa: ARG002  there is but one
        return self._tensor


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
