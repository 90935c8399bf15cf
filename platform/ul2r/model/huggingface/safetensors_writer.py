"""Streamed writing of safetensors: no file is ever in memory, nor, usually, a whole tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ul2r.model.huggingface.safetensors_reader import INDEX_FILE, SINGLE_FILE

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Names of the format."""
NUM_THREADS = 4
"""Files written at the same time."""


@dataclass(frozen=True)
class StreamedTensor:
    """Tensor that is produced block by block.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        read_blocks: Returns its rows in blocks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Wrap a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, tensors: Mapping[str, StreamedTensor], shard_bytes: int) -> None:
    """Write one file, or several and their index.

    Args:
        folder: Destination.
        tensors: Tensors by name, in the order of the files.
        shard_bytes: Largest size of a file, exceeded only by a single larger tensor.
    """
    shards = _split_into_shards(tensors, shard_bytes)
    count = len(shards)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [SINGLE_FILE]

    # Threads suffice: reading mapped pages and writing files release the GIL.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(_write_file, [folder / file for file in files], shards))  # raises errors

    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split_into_shards(
    tensors: Mapping[str, StreamedTensor], shard_bytes: int
) -> list[dict[str, StreamedTensor]]:
    shards: list[dict[str, StreamedTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, StreamedTensor]) -> None:
    """Write the header, which shapes and dtypes determine, then block after block."""
    # Widest dtype first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    # As transformers writes it; its version 4 refuses files that name no format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin = end
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data that follows is aligned to 8 bytes

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data_start = file.tell()
        for name, tensor in ordered:
            for block in tensor.read_blocks():
                # numpy has no bfloat16, so blocks are written as bytes.
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
            assert file.tell() == data_start + header[name]["data_offsets"][1], name
