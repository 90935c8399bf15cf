"""Files of a checkpoint from elsewhere: what could run code is refused by name, and does not run."""

from __future__ import annotations

import builtins
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.serialization import _get_layout

from ul2r.errors import CheckpointError
from ul2r.inference.loading import load_network
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader, find_latest_iteration
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.restricted_reader import RestrictedReader, load_restricted

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint written by torch, with a tensor, an object and a number."""
    folder = tmp_path / "checkpoint"
    state = {
        "weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "object": {"note": "any"},
        "step": 5,
    }
    save(state, checkpoint_id=folder, no_dist=True)
    return folder


def rewrite_metadata(checkpoint: Path, change: Callable[[Metadata], object]) -> None:
    """Change a checkpoint's description in place."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_tensors_that_torch_wrote_are_read_and_objects_left_out(checkpoint: Path) -> None:
    reader = MegatronCheckpointReader(checkpoint)
    assert reader.read_tensor("weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    metadata = RestrictedReader(checkpoint).read_metadata()
    assert list(metadata.state_dict_metadata) == ["weight"]
    stored = pickle.loads((checkpoint / ".metadata").read_bytes())
    kinds = {type(found) for found in stored.state_dict_metadata.values()}
    assert BytesStorageMetadata in kinds, "the file has objects"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (exec, "exec"),
        (getattr, "getattr"),
        (torch.load, "torch.*load"),
    ],
)
def test_code_in_the_metadata_is_refused_by_name_and_not_run(
    function: Callable[..., object], name: str, protocol: int, checkpoint: Path, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    code = f"touch {written}" if function is os.system else f"open({str(written)!r}, 'w')"
    stored = pickle.loads((checkpoint / ".metadata").read_bytes())
    stored.planner_data = Call(function, code)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(stored, protocol))

    with pytest.raises(
        CheckpointError,
        match=rf"/\.metadata: refers to .*{name}, which is not part of a checkpoint",
    ):
        MegatronCheckpointReader(checkpoint)
    assert not written.exists()


@pytest.mark.parametrize(
    "name", ["torch.Size.__class__", "torch.nn", "torch._C", "torch.float32.x"]
)
def test_names_inside_of_allowed_modules_are_refused(name: str, checkpoint: Path) -> None:
    module, _, attribute = name.partition(".")
    # Protocol 4 resolves dotted names itself, attribute by attribute.
    names = [
        pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, attribute)
    ]
    (checkpoint / ".metadata").write_bytes(
        b"".join([pickle.PROTO, b"\x04", *names, pickle.STACK_GLOBAL, pickle.STOP])
    )
    with pytest.raises(CheckpointError, match=f"refers to {name}, which"):
        RestrictedReader(checkpoint).read_metadata()


@pytest.mark.parametrize(
    ("target", "state"),
    [
        # A class, a function and a member of an enum, of which the process has one each.
        (b"cpathlib\nPosixPath\n", b"N}X\x04\0\0\0nameX\x01\0\0\0xs\x86"),
        (b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"N}X\x01\0\0\0aK\x01s\x86"),
        (b"ctorch.serialization\n_get_layout\n", b"}X\x01\0\0\0aK\x01s"),
        (
            b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x01\x85R",
            b"}X\x01\0\0\0aK\x01s",
        ),
    ],
)
def test_metadata_that_changes_a_class_or_function_is_refused(
    target: bytes, state: bytes, checkpoint: Path
) -> None:
    stored = (checkpoint / ".metadata").read_bytes()
    protocol, content = stored[:2], stored[2:]
    change = target + state + pickle.BUILD + pickle.POP
    (checkpoint / ".metadata").write_bytes(protocol + change + content)
    before = [dict(vars(kind)) for kind in (PosixPath, Metadata, WriteItemType.TENSOR, _get_layout)]
    with pytest.raises(CheckpointError, match=r"refers to a change of .*, which is not part"):
        RestrictedReader(checkpoint).read_metadata()
    after = [dict(vars(kind)) for kind in (PosixPath, Metadata, WriteItemType.TENSOR, _get_layout)]
    assert after == before


@pytest.mark.parametrize(
    "instructions",
    [
        b"(cpathlib\nPosixPath\no0",  # OBJ
        b"(ipathlib\nPosixPath\n0",  # INST
        b"cpathlib\nPosixPath\n)}\x920",  # NEWOBJ_EX
        b"\x82\x010",  # EXT1
        b"cpathlib\nPosixPath\nNa0",  # APPEND
        b"cpathlib\nPosixPath\n(Ne0",  # APPENDS
        b"cpathlib\nPosixPath\nNNs0",  # SETITEM
        b"cpathlib\nPosixPath\n(NNu0",  # SETITEMS
    ],
)
def test_instructions_that_torch_does_not_write_are_refused(
    instructions: bytes, checkpoint: Path
) -> None:
    stored = (checkpoint / ".metadata").read_bytes()
    protocol, content = stored[:2], stored[2:]
    (checkpoint / ".metadata").write_bytes(protocol + instructions + content)
    with pytest.raises(CheckpointError, match=r"refers to an? .*which is not part of a checkpoint"):
        RestrictedReader(checkpoint).read_metadata()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04N.", b"\x80\x04]\x94.", b"garbage" * 9])
def test_damaged_metadata_is_refused_in_one_line(content: bytes, checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not the metadata of a torch_dist .*copy the check"):
        MegatronCheckpointReader(checkpoint)


@pytest.mark.parametrize("name", ["/etc/passwd", "../weights", "a/../../b"])
def test_metadata_that_names_a_file_elsewhere_is_refused(name: str, checkpoint: Path) -> None:
    def move(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = name

    rewrite_metadata(checkpoint, move)
    with pytest.raises(
        CheckpointError, match=rf"names '{name}', which is not a file of the checkp"
    ):
        MegatronCheckpointReader(checkpoint)


def test_tensor_that_is_said_to_be_an_object_is_missing(checkpoint: Path) -> None:
    def disguise(metadata: Metadata) -> None:
        metadata.state_dict_metadata["weight"] = BytesStorageMetadata()

    rewrite_metadata(checkpoint, disguise)
    with pytest.raises(CheckpointError, match="has no tensor weight"):
        MegatronCheckpointReader(checkpoint).read_tensor("weight")


def test_code_in_a_file_of_torch_save_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Makes torch.load unpickle everything wherever the call leaves it open.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "common.pt"
    torch.save({"optimizer": Call(os.system, f"touch {tmp_path}/written")}, path)
    with pytest.raises(CheckpointError, match=r"common\.pt: refers to posix\.system, which is not"):
        load_restricted(path)
    assert not (tmp_path / "written").exists()

    torch.save({"optimizer": {"lr": 0.1, "state": torch.ones(2)}}, path)
    assert load_restricted(path)["optimizer"]["lr"] == 0.1
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(CheckpointError, match="cannot be loaded as tensors and plain values"):
        load_restricted(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_restricted(tmp_path / "missing.pt")


@pytest.mark.parametrize("iteration", ["../other", "/etc", "", "a b", "..\\x"])
def test_pointer_to_another_folder_is_refused(iteration: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(iteration)
    with pytest.raises(
        CheckpointError, match=r"which is not a folder next to it: set base\.megatron"
    ):
        find_latest_iteration(tmp_path)


@pytest.mark.parametrize("read", [read_architecture, lambda folder: load_network(folder, "cpu")])
def test_code_that_a_hugging_face_folder_brings_is_not_run(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers asks whether to run it, on a terminal; somebody answers yes.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    (tmp_path / "config.json").write_text(
        '{"model_type": "unheard_of", "auto_map": '
        '{"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        read(tmp_path)
    assert not (tmp_path / "written").exists()
