"""Tensors as files of safetensors, streamed: no file is ever in memory, nor, as a rule, a tensor."""

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

from ul2r.model.huggingface.safetensors_reader import INDEX, SINGLE

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Names of the format."""
FILES_AT_ONCE = 4
"""Each is written by a thread of its own."""


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of which a part is in memory at a time.

    Attributes:
        shape: Of the whole.
        dtype: Of the whole.
        blocks: Gives its rows, some at a time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """One that is in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, tensors: Mapping[str, StreamedTensor], shard_bytes: int) -> None:
    """Write one file, or several and their index.

    Args:
        folder: Where they go.
        tensors: By name, in the order of the files.
        shard_bytes: What a file holds at most, unless a tensor alone is larger.
    """
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(_write_file, [folder / name for name in names], shards))
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
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
    """Header first, since shapes and types are known, then block after block."""
    ordered = sorted(tensors.items(), key=lambda one: -one[1].dtype.itemsize)  # so all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, tensor in ordered:
            for block in tensor.blocks():
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
            assert file.tell() == start + header[name]["data_offsets"][1], name
