"""Reading of GGUF files, llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2, 3).

The package `gguf` knows the types of quantized blocks and undoes them. Its own reader of files takes a minute for the
tokenizer of a small model, since it makes several arrays for each token; here only the header is parsed, in a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""From the format's types of numbers to struct's."""
STRING = 8
ARRAY = 9
DEFAULT_ALIGNMENT = 32
"""Bytes, if general.alignment does not say otherwise."""


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor in its file.

    Attributes:
        shape: Rows first, as in torch; the format writes it the other way around.
        kind: Name of the type of its blocks, such as Q4_0.
        offset: First byte in the file.
        row_bytes: Bytes of one row, or of the whole tensor if it has one axis.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """An open file: its metadata, its tensors' places, and their values in float32.

    Attributes:
        metadata: Values by key; an array is a list of texts or a numpy array of numbers.
        tensors: Places of the tensors by name.
    """

    def __init__(self, path: Path) -> None:
        """Map the file into memory and parse its header.

        Raises:
            CheckpointError: If it is no GGUF file, damaged, incomplete, or has blocks that are not known.
        """
        gguf = _import_gguf()
        self._path = path
        self._dequantize: Callable[..., npt.NDArray[np.float32]] = gguf.dequantize
        self._kinds = gguf.GGMLQuantizationType
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap refuses an empty file by ValueError
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{path} cannot be read: {reason}") from None

        self._position = 0
        self._check_version()
        try:
            num_tensors = self._read_number("Q")
            num_keys = self._read_number("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(num_keys):
                key = self._read_string()
                self.metadata[key] = self._read_value(self._read_number("I"))
            entries = [self._read_entry() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, ValueError):
            raise CheckpointError(
                f"{path}: its header is damaged or incomplete: download the file again"
            ) from None
        self.tensors = self._locate(entries, gguf)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows [start, stop) of a matrix, or elements of a vector that is not quantized, in float32.

        Raises:
            CheckpointError: If the package gguf cannot undo its type of blocks.
        """
        tensor = self.tensors[name]
        row_bytes = tensor.row_bytes
        if len(tensor.shape) == 1:
            row_bytes //= tensor.shape[0]
        count = (stop - start) * row_bytes
        blocks = np.frombuffer(self._data, np.uint8, count, tensor.offset + start * row_bytes)
        kind = self._kinds[tensor.kind]
        try:
            values = self._dequantize(blocks.reshape(stop - start, row_bytes), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self._path}: {name}: type {tensor.kind} cannot be converted to numbers: get the model in another, "
                "such as Q8_0"
            ) from None
        return values.reshape(stop - start, *tensor.shape[1:]).astype(np.float32, copy=False)

    def _check_version(self) -> None:
        if self._data[:4] != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file")
        self._position = len(MAGIC)
        try:
            version = self._read_number("I")
        except struct.error:
            raise CheckpointError(f"{self._path} is not a GGUF file") from None
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path}: GGUF version {version} cannot be read, only little-endian files of versions 2 and 3: "
                "get a newer file of the model"
            )

    def _read_number(self, code: str) -> Any:  # noqa: ANN401  an int, a float or a bool
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _read_string(self) -> str:
        length = self._read_number("Q")
        end = self._position + length
        if end > len(self._data):
            raise ValueError("a text goes on after the end of the file")
        text = self._data[self._position : end].decode()
        self._position = end
        return text

    def _read_value(self, kind: int) -> Any:  # noqa: ANN401  any type of the format
        if kind == STRING:
            return self._read_string()
        if kind != ARRAY:
            return self._read_number(NUMBERS[kind])

        element = self._read_number("I")
        count = self._read_number("Q")
        if element in NUMBERS:
            dtype = np.dtype("<" + NUMBERS[element])
            values = np.frombuffer(self._data, dtype, count, self._position)
            self._position += values.nbytes
            return values
        return [self._read_value(element) for _ in range(count)]

    def _read_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._read_string()
        num_axes = self._read_number("I")
        shape = tuple(self._read_number("Q") for _ in range(num_axes))[::-1]
        return name, shape, self._read_number("I"), self._read_number("Q")

    def _locate(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], gguf: ModuleType
    ) -> dict[str, GgufTensor]:
        alignment = int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        first = -(-self._position // alignment) * alignment
        known = {int(kind) for kind in self._kinds}
        tensors = {}
        for name, shape, number, offset in entries:
            if number not in known:
                raise CheckpointError(
                    f"{self._path}: {name}: blocks of type {number} are not known to the package gguf: update it"
                )
            kind = self._kinds(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = shape[-1] // block * block_bytes
            tensor = GgufTensor(shape, kind.name, first + offset, row_bytes)
            if tensor.offset + tensor.nbytes > len(self._data):
                raise CheckpointError(
                    f"{self._path}: ends before its tensor {name}: download the file again"
                )
            tensors[name] = tensor
        return tensors


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "reading GGUF files needs the package gguf: pip install 'ul2r[gguf]', or pip install gguf"
        ) from None
    module: ModuleType = gguf
    return module
