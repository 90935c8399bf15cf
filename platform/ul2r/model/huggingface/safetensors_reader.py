"""Reading of a folder of safetensors: checked as a whole first, then read one slice at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ul2r.config import Architecture
from ul2r.config.architecture import FamilyName
from ul2r.errors import CheckpointError
from ul2r.filesystem import suggest_path
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import TensorSlice, slice_tensor, tensor_shapes
from ul2r.model.huggingface.hub import download_model
from ul2r.model.tensors import EMBEDDING
from ul2r.paths import EXPORT_METADATA_FILE, is_file_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATING_POINT = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that are converted to the training's."""
ROWS_PER_BLOCK = 1024
"""Rows of an embedding that are compared at a time."""
PICKLED_FILES = "pytorch_model*.bin"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DOWNLOADED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "*.safetensors",
    INDEX_FILE,
    EXPORT_METADATA_FILE,
]


def resolve_model_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a base: a path as given, or a Hub model's files, downloaded if not in the cache.

    A model whose commit is given and that is in the cache needs no network.

    Args:
        name: Folder, or name on the Hub.
        revision: Branch, tag or commit on the Hub; by default its main branch.

    Raises:
        CheckpointError: If there is no such folder, or the model cannot be downloaded or is damaged on the way.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"base.revision={revision}: base.hf={name} is a folder, which has no revisions: leave the first out"
            )
        return folder.absolute()
    if folder.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"base.hf={name}: the folder does not exist{suggest_path(folder)}")

    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Every worker may resolve the base: their bars would fill the logs.
    disable_progress_bars()
    try:
        return download_model(name, revision, DOWNLOADED_FILES)
    except CheckpointError:
        raise
    # Its HTTP client's errors about proxies, certificates and missing packages have no base in common.
    except Exception as error:  # noqa: BLE001  as above
        reason = str(error).strip().partition("\n")[0]
        certificates = os.environ.get("SSL_CERT_FILE", "")
        if certificates and not Path(certificates).exists():
            reason = f"SSL_CERT_FILE={certificates} does not exist"
        raise CheckpointError(
            f"base.hf={name}{f' (revision {revision})' if revision else ''} is not a folder and could not be "
            "downloaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}): point to a folder, or download it on a machine with a network"
        ) from None


def untie_own_output(folder: Path, architecture: Architecture) -> Architecture:
    """Return the architecture with an output matrix of its own, if the folder holds one that is not the embedding.

    transformers 5 keeps such a matrix although config.json says that it is the embedding (`tie_weights` in its
    modeling_utils.py), so the model is one with untied embeddings.

    Raises:
        CheckpointError: If a file is missing or cannot be read.
    """
    if not architecture.tie_embeddings:
        return architecture
    with SafetensorsReader(folder, architecture.family) as reader:
        is_own = reader.has_own_output(architecture)
    return architecture.model_copy(update={"tie_embeddings": not is_own})


def _suggest_weights(folder: Path) -> str:
    """Return what to do about a folder without safetensors."""
    pickled = sorted(path.name for path in folder.glob(PICKLED_FILES))
    # Only the files of `DOWNLOADED_FILES` are fetched from the Hub.
    if not pickled and find_commit(folder) is None:
        return "point to a model's folder"
    held = (
        f"its {pickled[0]}" if pickled else f"the {PICKLED_FILES} that the model may have instead"
    )
    return (
        f"{held} is a pickle, which can run code and is not read; if you trust it, convert it: python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
        ".save_pretrained('NEW')\", and copy tokenizer.json to NEW"
    )


def find_commit(folder: Path) -> str | None:
    """Return the commit of a folder in the Hub's cache, None for any other folder."""
    # The cache keeps the files of each commit in snapshots/COMMIT.
    return folder.name if folder.parent.name == "snapshots" else None


def check_tensors(folder: Path, architecture: Architecture) -> None:
    """Check that a folder's safetensors hold exactly the tensors of an architecture.

    Raises:
        CheckpointError: If files or tensors are missing, too many, or of another shape.
    """
    with SafetensorsReader(folder, architecture.family) as reader:
        reader.check(architecture)


class SafetensorsReader:
    """Tensors of a folder by name.

    Args:
        folder: Folder with model.safetensors, or with shards and their index.
        family: Family of the model in it.

    Raises:
        CheckpointError: If a file is missing or cannot be read.
    """

    def __init__(self, folder: Path, family: FamilyName) -> None:
        self.folder = folder
        self.family = FAMILIES[family]
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}
        self._names, self._files = self._locate_tensors()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    @property
    def identity(self) -> str:
        """Digest of the configuration and of the files' headers and sizes, without the weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self._files.values())):
            path = self.folder / file
            with path.open("rb") as stream:
                # A file begins with the length of its JSON header in 8 bytes, little-endian.
                digest.update(stream.read(8 + int.from_bytes(stream.read(8), "little")))
            digest.update(str(path.stat().st_size).encode())
        return "hf-" + digest.hexdigest()[:29]

    def read_rows(self, part: TensorSlice, start: int, stop: int, columns: slice | None) -> Tensor:
        """Read rows [start, stop) of a slice in Megatron's orientation, and no others.

        Args:
            part: Slice of a tensor.
            start: First row, relative to the slice.
            stop: One past the last row.
            columns: Columns of a matrix; None for a vector.
        """
        stored = self._open_slice(part.name)
        rows = slice(part.start + start, part.start + stop)
        if columns is None:
            tensor: Tensor = stored[rows]
        elif part.transposed:
            tensor = stored[columns, rows].t()
        else:
            tensor = stored[rows, columns]
        return tensor

    def _open_slice(self, name: str) -> Any:  # noqa: ANN401  safetensors has no type for it
        return self._open_file(self._files[name]).get_slice(self._names[name])

    def _open_file(self, file: str) -> Any:  # noqa: ANN401  as above
        if file not in self._handles:
            try:
                opened = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / file} cannot be read ({error}): download the file again"
                ) from None
            self._handles[file] = self._open_files.enter_context(opened)
        return self._handles[file]

    def _locate_tensors(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return each tensor's name in its file, and the file, by its full name.

        A full name begins with the family's base, which some files omit.
        """
        index = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).is_file():
            files = dict.fromkeys(self._open_file(SINGLE_FILE).keys(), SINGLE_FILE)
        elif index.is_file():
            files = _read_index(index)
            self._check_index(index, files)
        else:
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {_suggest_weights(self.folder)}"
            )

        base = self.family.base
        output = self.family.output
        # Files saved from the class without a head (GPT2Model) omit the prefix "transformer."; the output matrix never
        # has it.
        has_base = any(name.startswith(base) for name in files)
        names = {name if has_base or name == output else base + name: name for name in files}
        return names, {full_name: files[name] for full_name, name in names.items()}

    def _check_index(self, index: Path, files: Mapping[str, str]) -> None:
        for file in sorted(set(files.values())):
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{index} names {file}, which is missing: download it again")
        for name, file in files.items():
            if name not in self._open_file(file).keys():  # noqa: SIM118  not a mapping
                raise CheckpointError(f"{index}: {name} is not in {file}: download both again")

    def has_own_output(self, architecture: Architecture) -> bool:
        """Return whether there are both an embedding and an output matrix, with different values."""
        embedding = slice_tensor(self.family, architecture, EMBEDDING, (), 1)[0].name
        output = self.family.output
        if embedding not in self._files or output not in self._files:
            return False

        ours = self._open_slice(embedding)
        theirs = self._open_slice(output)
        shape = ours.get_shape()
        if shape != theirs.get_shape():
            return True
        # In blocks, since each may have gigabytes; as fp32, since they may be stored in different dtypes.
        for first in range(0, shape[0], ROWS_PER_BLOCK):
            rows = slice(first, first + ROWS_PER_BLOCK)
            if not torch.equal(ours[rows].float(), theirs[rows].float()):
                return True
        return False

    def check(self, architecture: Architecture) -> None:
        """Check that the files hold exactly the tensors of an architecture.

        Raises:
            CheckpointError: If tensors are missing or superfluous, or one has another shape or is quantized.
        """
        assert architecture.num_embeddings is not None
        expected = tensor_shapes(self.family, architecture, architecture.num_embeddings)
        missing = [name for name in expected if name not in self._files]
        if missing == [self.family.output]:
            # transformers would fill it with random values.
            raise CheckpointError(
                f"{self.folder}: there is no tensor {missing[0]}, but config.json says tie_word_embeddings=false: set "
                "it to true if the output matrix is the embedding, else download the folder again"
            )
        if missing:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors of the model in config.json are missing, the first is "
                f"{missing[0]}: download the folder again"
            )

        # Files of a model with tied embeddings may hold the output matrix nevertheless: a copy of the embedding, see
        # `untie_own_output`.
        tied = (self.family.output,) if architecture.tie_embeddings else ()
        ignored = (*self.family.unused_suffixes, *tied)
        unknown = [
            name for name in self._files if name not in expected and not name.endswith(ignored)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.folder}: {len(unknown)} tensors do not belong to the model in config.json, the first is "
                f"{unknown[0]}: weights and config.json belong to different models"
            )

        for name, shape in expected.items():
            stored = self._open_slice(name)
            if stored.get_dtype() not in FLOATING_POINT:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {stored.get_dtype()}: only weights that are not quantized are "
                    f"supported ({', '.join(FLOATING_POINT)})"
                )
            found = tuple(stored.get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found}, but {shape} according to config.json: "
                    "weights and config.json belong to different models"
                )


def _read_index(file: Path) -> dict[str, str]:
    try:
        files = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not an index of shards: {error}") from None
    for name in files.values():
        if not is_file_name(name):
            raise CheckpointError(
                f"{file} names {name!r}, which is not a file of the folder: download the folder again"
            )
    return files
