"""A folder of safetensors: checked as a whole before anything is read, then read a slice at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ul2r.config import Architecture
from ul2r.errors import CheckpointError
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import TensorSlice, tensor_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["config.json", "generation_config.json", "tokenizer*", "*.safetensors", INDEX]


def resolve_model_folder(name: str) -> Path:
    """The folder of a base: a path as it is, a model of the Hub from the cache or, failing that, the network.

    Raises:
        CheckpointError: If there is no such folder, or the model cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"base.hf={name}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"base.hf={name}: is no folder, and could not be had from the Hugging Face Hub "
            f"({type(error).__name__}): give a folder, or fetch it where there is a network"
        ) from None


class SafetensorsReader:
    """The tensors of a folder, by name.

    Args:
        folder: With model.safetensors, or shards and their index.
        architecture: What its config.json says.

    Raises:
        CheckpointError: If files or tensors are missing, too many, or of another shape than the architecture's.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder, self.family = folder, FAMILIES[architecture.family]
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._place = self._index()
        self._check(architecture)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def identity(self) -> str:
        """Digest of the configuration and of what the files hold, their numbers apart."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self._place.values())):
            path = self.folder / file
            with path.open("rb") as stream:
                digest.update(stream.read(8 + int.from_bytes(stream.read(8), "little")))
            digest.update(str(path.stat().st_size).encode())
        return "hf-" + digest.hexdigest()[:29]

    def read(self, part: TensorSlice, start: int, stop: int, columns: slice | None) -> Tensor:
        """Rows `start` to `stop` of a part, as Megatron has them, without reading others.

        Args:
            part: Of a tensor.
            start: First row, counted from the part's.
            stop: One past the last.
            columns: Of a matrix.
        """
        stored = self._slice(part.name)
        rows = slice(part.start + start, part.start + stop)
        if columns is None:
            tensor: Tensor = stored[rows]
        elif part.transposed:
            tensor = stored[columns, rows].t()
        else:
            tensor = stored[rows, columns]
        return tensor

    def _slice(self, name: str) -> Any:  # noqa: ANN401  safetensors has no type for it
        return self._handle(self._place[name]).get_slice(self._stored[name])

    def _handle(self, file: str) -> Any:  # noqa: ANN401  as above
        if file not in self._open:
            try:
                opened = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / file}: cannot be read ({error}): get the file again"
                ) from None
            self._open[file] = self._files.enter_context(opened)
        return self._open[file]

    def _index(self) -> dict[str, str]:
        """The file that holds each tensor; names get the family's base where the file leaves it out."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            place = dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        elif index.is_file():
            place = _read_index(index)
            for file in sorted(set(place.values())):
                if not (self.folder / file).is_file():
                    raise CheckpointError(f"{index} names {file}, which is not there: get it again")
            for name, file in place.items():
                if name not in self._handle(file).keys():  # noqa: SIM118  no mapping
                    raise CheckpointError(f"{index}: {name} is not in {file}: get both again")
        else:
            raise CheckpointError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}: point to a model's folder"
            )
        base, output = self.family.base, self.family.output
        named = any(name.startswith(base) for name in place)
        self._stored = {name if named or name == output else base + name: name for name in place}
        return {name: place[stored] for name, stored in self._stored.items()}

    def _check(self, architecture: Architecture) -> None:
        assert architecture.num_embeddings is not None
        wanted = tensor_shapes(self.family, architecture, architecture.num_embeddings)
        missing = [name for name in wanted if name not in self._place]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors that config.json asks for are not there, the first "
                f"{missing[0]}: get the folder again"
            )
        ends = (
            *self.family.left_over,
            *((self.family.output,) if architecture.tie_embeddings else ()),
        )
        unknown = [name for name in self._place if name not in wanted and not name.endswith(ends)]
        if unknown:
            raise CheckpointError(
                f"{self.folder}: {len(unknown)} tensors are not what config.json describes, the first {unknown[0]}"
            )
        for name, shape in wanted.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found}, config.json makes it {shape}: "
                    "one of them belongs to another model"
                )


def _read_index(file: Path) -> dict[str, str]:
    try:
        places: Mapping[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return dict(places)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is no index of shards: {error}") from None
