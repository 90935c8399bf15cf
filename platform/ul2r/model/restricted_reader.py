"""Reading of a distributed checkpoint without running code from its files.

torch describes a checkpoint (`torch_dist`) in a pickle, `.metadata`, and pickles objects between the tensors. Python
runs whatever a pickle says, so a checkpoint from elsewhere could run its author's code on each machine that opens it,
even to check a recipe. Here `.metadata` may name the classes of torch's own descriptions and nothing else, and objects
are left out: models and optimizer states consist of tensors.
"""

from __future__ import annotations

import pickle
from dataclasses import is_dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ul2r.errors import CheckpointError
from ul2r.paths import is_file_name

METADATA_FILE = ".metadata"
"""torch's description of a `torch_dist` checkpoint, present in each of them."""

# What torch 2.1 to 2.13 and Megatron-Core 0.7 to 0.19 write. Each is plain data: making one, with any arguments, has no
# effect outside of it.
ALLOWED_GLOBALS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
"""Names that `.metadata` may refer to, by module; torch's dtypes, such as torch.bfloat16, as well."""

REFUSED_OPCODES = (
    pickle.ADDITEMS[0],
    pickle.BYTEARRAY8[0],
    pickle.EXT1[0],
    pickle.EXT2[0],
    pickle.EXT4[0],
    pickle.INST[0],
    pickle.NEWOBJ_EX[0],
    pickle.OBJ[0],
)
"""Instructions that call or change something, or reserve memory, and that torch's descriptions do not need."""


class RestrictedReader(FileSystemReader):
    """Reader of a checkpoint's tensors, which reads `.metadata` once.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        """Return the description of the tensors; that of objects is left out, so that none is ever unpickled.

        Raises:
            CheckpointError: If `.metadata` is damaged, or refers to anything but torch's descriptions.
            OSError: If there is none.
        """
        if self._metadata is None:
            self._metadata = _read_metadata(self.folder / METADATA_FILE)
        return self._metadata

    def read_object(self, key: str) -> Any:  # noqa: ANN401  any nested structure
        """Load an object of tensors and plain values that is stored among the tensors.

        Raises:
            CheckpointError: If there is none of that name, or it is anything else.
        """
        place = self.read_metadata().storage_data.get(MetadataIndex(key))
        if place is None:
            raise CheckpointError(f"{self.folder}: has no {key}: restore an earlier checkpoint")
        path = self.folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = BytesIO(file.read(place.length))
        return _load(content, path)


def load_restricted(path: Path) -> Any:  # noqa: ANN401  any nested structure
    """Load a file that torch.save wrote, of tensors and plain values only.

    Raises:
        CheckpointError: If it refers to anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _load(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _load(file: BinaryIO, path: Path) -> Any:  # noqa: ANN401  any nested structure
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  a damaged archive or pickle may raise anything
        file.seek(0)
        raise CheckpointError(_describe_refused(file, path, error)) from None


def _read_metadata(path: Path) -> Metadata:
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file, path).load()
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001  a damaged pickle may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"{path}: not the metadata of a torch_dist checkpoint ({reason}): copy the checkpoint again"
            ) from None

    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.storage_data, dict)
        or not isinstance(metadata.state_dict_metadata, dict)
    ):
        raise CheckpointError(
            f"{path}: not the metadata of a torch_dist checkpoint: copy the checkpoint again"
        )
    for place in metadata.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not is_file_name(name):
            raise CheckpointError(
                f"{path}: names {name!r}, which is not a file of the checkpoint: "
                "get it from a source that you trust"
            )
    metadata.state_dict_metadata = {
        key: found
        for key, found in metadata.state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }
    return metadata


# typeshed lacks its stacks and most of its methods, which are the same in CPython 3.11 to 3.14.
PythonUnpickler: Any = pickle._Unpickler


# The interpreter in Python, since the one in C has no hook but `find_class`: its BUILD sets attributes of whatever it
# is given, also of an allowed class, for the whole process. For
# 100,000 tensors it takes about 10 s.
class _MetadataUnpickler(PythonUnpickler):  # type: ignore[misc]  # typed as Any above
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401  the base class's signature
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if not is_dtype and global_name not in ALLOWED_GLOBALS.get(module_name, ()):
            raise CheckpointError(_refuse(self._path, f"{module_name}.{global_name}"))
        return super().find_class(module_name, global_name)

    def _build(self) -> None:
        # Classes, functions and members of an enum are those of the whole process.
        target = self.stack[-2]
        if isinstance(target, type) or not is_dataclass(target):
            raise CheckpointError(_refuse(self._path, f"a change of {target!r}"))
        super().load_build()

    def _append(self) -> None:
        self._require(self.stack[-2], list)
        super().load_append()

    def _append_items(self) -> None:
        # The items are on a stack of their own.
        self._require(self.metastack[-1][-1], list)
        super().load_appends()

    def _set_item(self) -> None:
        self._require(self.stack[-3], dict)
        super().load_setitem()

    def _set_items(self) -> None:
        self._require(self.metastack[-1][-1], dict)
        super().load_setitems()

    def _require(self, target: object, kind: type) -> None:
        if not isinstance(target, kind):
            raise CheckpointError(_refuse(self._path, f"a change of {target!r}"))

    def _refuse_opcode(self) -> None:
        raise CheckpointError(_refuse(self._path, "an instruction that torch does not write"))

    # REDUCE and NEWOBJ call what `find_class` has allowed: there is no other way to anything that can be called.
    dispatch = {  # noqa: RUF012  the base class's
        **PythonUnpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _append_items,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        **dict.fromkeys(REFUSED_OPCODES, _refuse_opcode),
    }


def _describe_refused(file: BinaryIO, path: Path, error: Exception) -> str:
    try:
        # torch's own message is a page of advice on how to load the file after all.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # noqa: BLE001  as above
        names = []
    if names:
        return _refuse(path, names[0])
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{path}: cannot be loaded as tensors and plain values ({reason}): restore an earlier checkpoint"


def _refuse(path: Path, name: str) -> str:
    return (
        f"{path}: refers to {name}, which is not part of a checkpoint and could run code: "
        "get the checkpoint from a source that you trust"
    )
