"""End of a run: when copies of its checkpoints are waited for, and which of their errors end it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import pytest

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.checkpointer import Checkpointer
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.remote import RemoteCheckpoints
from ul2r.train.checkpoint.storage import CheckpointStore
from ul2r.train.mesh import Mesh

T = TypeVar("T")


class OneRank:
    """A mesh of one rank, without torch's process groups."""

    is_rank0 = True

    def broadcast_from_rank0(self, function: Callable[[], T]) -> T:
        """Return what rank 0 computes."""
        return function()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "step_00000002"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("weights")
    write_digests(folder, {})
    return folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Closed, it holds up every copy."""
    gate = threading.Event()
    upload = RemoteCheckpoints.upload

    def wait_and_upload(*args: object, **options: object) -> None:
        gate.wait()
        cast("Callable[..., None]", upload)(*args, **options)

    monkeypatch.setattr(RemoteCheckpoints, "upload", wait_and_upload)
    yield gate
    gate.set()  # no thread is left behind


def begin_copy(folder: Path, url: str) -> Checkpointer:
    checkpointer = Checkpointer(
        CheckpointStore(folder.parent, remote=RemoteCheckpoints(url, "tiny")),
        cast("Mesh", OneRank()),
        log=lambda *_: None,
        flush=lambda: None,
        heartbeat=lambda: None,
        asynchronous=True,
        stall_timeout_s=60,
    )
    checkpointer.copy_resumed(folder)
    return checkpointer


def test_requested_stop_waits_for_no_copy_and_says_so(
    folder: Path, tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = begin_copy(folder, f"{tmp_path}/far")
    checkpointer.close(wait_for_copies=False)
    assert not gate.is_set()
    (line,) = caplog.messages
    assert line.startswith(f"the run stops without waiting for its copy to {tmp_path}/far/tiny (s")

    gate.set()
    checkpointer.close()
    caplog.clear()
    checkpointer.close(wait_for_copies=False)
    assert not caplog.messages, "everything is copied"


def test_diverged_run_copies_its_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    begin_copy(folder, f"{tmp_path}/far").close_diverged()
    assert (tmp_path / "far" / "tiny" / "latest").read_text() == folder.name


def test_copy_that_fails_is_logged_and_does_not_hide_the_divergence(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    begin_copy(folder, f"{tmp_path}/file").close_diverged()
    assert "checkpoints cannot be uploaded to" in caplog.messages[-1]

    with pytest.raises(CheckpointError, match="cannot be uploaded to"):
        begin_copy(folder, f"{tmp_path}/file").close()
