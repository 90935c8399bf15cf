"""Copies of checkpoints behind a URL: whole or not counted, kept as on disk, and taken where the disk has none."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from ul2r.errors import CheckpointError
from ul2r.train.checkpoint.checksums import find_damage, write_digests
from ul2r.train.checkpoint.remote import RemoteCheckpoints
from ul2r.train.checkpoint.retention import Retention
from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token, latest_valid


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for copies: a folder, and a store that has no folders at all."""
    place = (
        f"file://{tmp_path}/far" if request.param == "file" else f"memory://{uuid.uuid4().hex}/far"
    )
    yield place
    files, root = fsspec.core.url_to_fs(place)
    if files.exists(root):
        files.rm(root, recursive=True)


def write(store: CheckpointStore, *steps: int) -> None:
    """Write and copy, as a run does."""
    assert store.mirror is not None
    for step in steps:
        store.open(step)
        for name in ("weights", ".metadata"):
            (store.beside(step) / name).write_text(f"of step {step}")
        write_digests(store.beside(step), {})
        store.mirror.put(store.finish(step), store.retention)


def copied(mirror: RemoteCheckpoints) -> list[str]:
    files, root = fsspec.core.url_to_fs(mirror.url)
    return sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False))


def run_in(folder: Path, url: str, keep: int = 2, keep_every: int | None = None) -> CheckpointStore:
    return CheckpointStore(
        folder, Retention(keep, keep_every), acquire_writer_token(folder), RemoteCheckpoints(url, "tiny")
    )


def test_a_run_whose_disk_is_gone_goes_on_from_the_copy(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write(run_in(tmp_path / "old", url), 2, 4)
    store = CheckpointStore(tmp_path / "new", mirror=RemoteCheckpoints(url, "tiny"))
    path = latest_valid(store)
    assert path == tmp_path / "new" / "step_00000004"
    assert find_damage(path) is None
    assert (path / "weights").read_text() == "of step 4"
    assert caplog.messages == [f"{tmp_path}/new: step_00000004 was fetched from {url}/tiny"]
    assert latest_valid(CheckpointStore(tmp_path / "new")) == path, "the pointer is there as well"


def test_what_is_on_disk_is_taken_before_a_copy(tmp_path: Path, url: str) -> None:
    store = run_in(tmp_path / "run", url)
    write(store, 2, 4)
    (tmp_path / "run" / "step_00000004" / "weights").write_text("torn")
    assert latest_valid(store) == tmp_path / "run" / "step_00000002"
    shutil.rmtree(tmp_path / "run" / "step_00000002")
    path = latest_valid(store)
    assert path == tmp_path / "run" / "step_00000004"
    assert (path / "weights").read_text() == "of step 4"


def test_copies_are_kept_as_on_disk(tmp_path: Path, url: str) -> None:
    store = run_in(tmp_path / "old", url, keep=1, keep_every=4)
    write(store, 2, 4, 6)
    assert store.mirror is not None
    assert copied(store.mirror) == ["latest", "step_00000004", "step_00000006"]
    again = run_in(tmp_path / "new", url, keep=1, keep_every=4)
    latest_valid(again)
    write(again, 7)
    assert copied(store.mirror) == ["latest", "step_00000004", "step_00000007"], (
        "milestones outlive the disk they were written to"
    )


def test_a_copy_that_was_cut_off_does_not_count(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write(run_in(tmp_path / "old", url), 2, 4)
    files, root = fsspec.core.url_to_fs(f"{url}/tiny")
    files.pipe_file(f"{root}/step_00000004/weights", b"of")
    files.makedirs(f"{root}/step_00000006", exist_ok=True)
    files.pipe_file(f"{root}/step_00000006/weights", b"of step 6")
    store = CheckpointStore(tmp_path / "new", mirror=RemoteCheckpoints(url, "tiny"))
    path = latest_valid(store)
    assert path is not None
    assert path.name == "step_00000002"
    assert caplog.messages[0].startswith(
        f"copy {url}/tiny/step_00000004 is damaged (holds 2 of 9 bytes of weights)"
    )
    files.pipe_file(f"{root}/step_00000002/weights", b"of")
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"no whole copy is left \(step_00000004: holds 2"):
        latest_valid(store)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".restoring.lock"]


def test_without_any_copy_there_is_no_checkpoint(tmp_path: Path, url: str) -> None:
    assert latest_valid(CheckpointStore(tmp_path / "run", mirror=RemoteCheckpoints(url, "tiny"))) is None
    assert not (tmp_path / "run").exists()


def test_ranks_that_restore_at_the_same_time_fetch_once(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write(run_in(tmp_path / "old", url), 2)

    def restore() -> None:
        latest_valid(
            CheckpointStore(tmp_path / "new", mirror=RemoteCheckpoints(url, "tiny")),
        )

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.messages) == 1
    assert find_damage(tmp_path / "new" / "step_00000002") is None


def test_a_place_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = run_in(tmp_path / "run", f"{tmp_path}/file")
    with pytest.raises(
        CheckpointError, match=rf"cannot be copied to {tmp_path}/file/tiny: .*Not a directory"
    ):
        write(store, 2)
    assert latest_valid(CheckpointStore(tmp_path / "run")) is not None
    store = CheckpointStore(tmp_path / "new", mirror=RemoteCheckpoints("nowhere://bucket", "tiny"))
    with pytest.raises(
        CheckpointError, match="cannot be fetched from nowhere://bucket/tiny: Protocol"
    ):
        latest_valid(store)
