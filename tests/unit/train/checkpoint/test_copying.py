"""Copies of checkpoints in the background: in order, left out when overtaken, and waited for only while they move."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.copying import CheckpointCopies
from ul2r.train.checkpoint.remote import RemoteCheckpoints
from ul2r.train.checkpoint.retention import Retention

END_DURING_COPY = """
import sys
import threading
from pathlib import Path
from ul2r.train.checkpoint import remote
from ul2r.train.checkpoint.copying import CheckpointCopies
from ul2r.train.checkpoint.retention import Retention

is_copying = threading.Event()

def hang(*_):
    is_copying.set()
    threading.Event().wait()

remote._put_file = hang
copies = CheckpointCopies(remote.RemoteCheckpoints(sys.argv[2], "tiny"), Retention(9), 1e9)
copies.add(Path(sys.argv[1]))
assert is_copying.wait(60)
"""


class GatedFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store that takes a file only while its gate is open, and fails as often as it is told to."""

    protocol = "gated"
    # Its own: the base class keeps the files of all instances in one dict.
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    gate = threading.Event()
    num_failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("gated:")))

    def put_file(self, lpath: str, rpath: str, **_: object) -> None:
        """Upload a file of which fsspec reports nothing."""
        self.gate.wait()
        if GatedFileSystem.num_failures:
            GatedFileSystem.num_failures -= 1
            raise OSError("the connection was reset")
        super().put_file(lpath, rpath)


fsspec.register_implementation("gated", GatedFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def gate() -> Iterator[threading.Event]:
    """The closed gate of an empty object store."""
    GatedFileSystem.store.clear()
    GatedFileSystem.gate.clear()
    GatedFileSystem.num_failures = 0
    yield GatedFileSystem.gate
    GatedFileSystem.gate.set()  # no thread is left behind


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Four checkpoints of a run."""
    folders = [tmp_path / f"step_{step:08d}" for step in (1, 2, 3, 4)]
    for folder in folders:
        folder.mkdir()
        (folder / "weights").write_text(folder.name)
        write_digests(folder, {})
    return folders


def make_copies(stall_timeout_s: float = 1e9) -> CheckpointCopies:
    return CheckpointCopies(RemoteCheckpoints("gated://far", "tiny"), Retention(9), stall_timeout_s)


def list_copies() -> set[str]:
    return {path.split("/")[-2] for path in GatedFileSystem.store if path.endswith("digests.json")}


def test_checkpoints_are_copied_in_order_while_the_caller_goes_on(
    checkpoints: list[Path], gate: threading.Event
) -> None:
    copies = make_copies()
    for folder in checkpoints:
        copies.add(folder)
    assert copies.is_busy
    gate.set()
    copies.wait()
    assert list_copies() == {folder.name for folder in checkpoints}
    filesystem, root = fsspec.core.url_to_fs("gated://far/tiny")
    assert filesystem.cat_file(f"{root}/latest") == b"step_00000004"


def test_checkpoint_that_is_removed_before_its_turn_is_left_out_with_a_line(
    checkpoints: list[Path], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    copies = make_copies()
    first, second, third, _ = checkpoints
    for folder in (first, second, third):
        copies.add(folder)
    assert not copies.give_up(first), "it is being copied"
    assert copies.give_up(second)
    gate.set()
    copies.wait()
    assert list_copies() == {first.name, third.name}
    (line,) = caplog.messages
    assert line.startswith("step_00000002 is not copied to gated://far/tiny: copies are slower")
    assert copies.give_up(first)
    assert len(caplog.messages) == 1, "what has been copied is not missed"


def test_copy_without_progress_ends_in_one_line(checkpoints: list[Path]) -> None:
    copies = make_copies(stall_timeout_s=0)
    copies.add(checkpoints[0])
    with pytest.raises(CheckpointError, match="to gated://far/tiny makes no progress") as caught:
        copies.wait()
    assert "\n" not in str(caught.value)
    assert "guards.hang_timeout_s" in str(caught.value)


def test_last_copy_is_tried_twice(
    checkpoints: list[Path], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    gate.set()
    copies = make_copies()
    GatedFileSystem.num_failures = 1
    copies.add(checkpoints[0])
    copies.wait()
    assert list_copies() == {checkpoints[0].name}
    assert "the connection was reset" in caplog.text

    GatedFileSystem.num_failures = 2
    copies.add(checkpoints[1])
    with pytest.raises(CheckpointError, match="the connection was reset"):
        copies.wait()


def test_resumed_checkpoint_is_copied_only_if_no_later_one_has_been(
    checkpoints: list[Path], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    gate.set()
    caplog.set_level(logging.INFO)
    copies = make_copies()
    for folder, expected in ((checkpoints[1], 1), (checkpoints[0], 1), (checkpoints[2], 2)):
        copies.add(folder, only_newer=True)
        copies.wait()
        assert len(list_copies()) == expected
    assert list_copies() == {checkpoints[1].name, checkpoints[2].name}


def test_fault_of_the_program_is_raised_although_more_checkpoints_wait(
    checkpoints: list[Path], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        gate.wait()
        raise KeyError("a fault")

    monkeypatch.setattr(RemoteCheckpoints, "upload", fail)
    copies = make_copies(stall_timeout_s=1)
    for folder in checkpoints:
        copies.add(folder)
    gate.set()
    with pytest.raises(KeyError, match="a fault"):
        copies.wait()
    with pytest.raises(KeyError, match="a fault"):
        copies.add(checkpoints[0])


def test_copy_keeps_no_process_from_ending(checkpoints: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", END_DURING_COPY, str(checkpoints[0]), str(tmp_path / "far")]
    subprocess.run(command, check=True, timeout=60)
