"""Remote copies of checkpoints: uploaded, retained, and downloaded only if they are complete."""

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
    """A folder, and an object store without folders."""
    remote = (
        f"file://{tmp_path}/far" if request.param == "file" else f"memory://{uuid.uuid4().hex}/far"
    )
    yield remote
    filesystem, root = fsspec.core.url_to_fs(remote)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def write_checkpoints(store: CheckpointStore, *steps: int) -> None:
    """Write and upload, as a run does."""
    assert store.remote is not None
    for step in steps:
        store.create_staging_dir(step)
        for name in ("weights", ".metadata"):
            (store.staging_dir(step) / name).write_text(f"of step {step}")
        write_digests(store.staging_dir(step), {})
        store.remote.upload(store.publish(step), store.retention)


def list_remote(remote: RemoteCheckpoints) -> list[str]:
    filesystem, root = fsspec.core.url_to_fs(remote.url)
    return sorted(path.rpartition("/")[2] for path in filesystem.ls(root, detail=False))


def make_store(
    folder: Path, url: str, keep: int = 2, keep_every: int | None = None
) -> CheckpointStore:
    return CheckpointStore(
        folder,
        Retention(keep, keep_every),
        acquire_writer_token(folder),
        RemoteCheckpoints(url, "tiny"),
    )


def open_store(folder: Path, url: str) -> CheckpointStore:
    return CheckpointStore(folder, remote=RemoteCheckpoints(url, "tiny"))


def test_run_whose_disk_is_lost_resumes_from_the_remote_copy(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write_checkpoints(make_store(tmp_path / "old", url), 2, 4)

    path = latest_valid(open_store(tmp_path / "new", url))
    assert path == tmp_path / "new" / "step_00000004"
    assert find_damage(path) is None
    assert (path / "weights").read_text() == "of step 4"
    assert caplog.messages == [f"{tmp_path}/new: step_00000004 was downloaded from {url}/tiny"]
    assert latest_valid(CheckpointStore(tmp_path / "new")) == path, "the pointer is restored too"


def test_checkpoint_on_disk_is_preferred_over_a_remote_copy(tmp_path: Path, url: str) -> None:
    store = make_store(tmp_path / "run", url)
    write_checkpoints(store, 2, 4)
    (tmp_path / "run" / "step_00000004" / "weights").write_text("torn")
    assert latest_valid(store) == tmp_path / "run" / "step_00000002"

    shutil.rmtree(tmp_path / "run" / "step_00000002")
    path = latest_valid(store)
    assert path == tmp_path / "run" / "step_00000004"
    assert (path / "weights").read_text() == "of step 4"


def test_remote_copies_are_retained_as_on_disk(tmp_path: Path, url: str) -> None:
    store = make_store(tmp_path / "old", url, keep=1, keep_every=4)
    write_checkpoints(store, 2, 4, 6)
    assert store.remote is not None
    assert list_remote(store.remote) == ["latest", "step_00000004", "step_00000006"]

    again = make_store(tmp_path / "new", url, keep=1, keep_every=4)
    latest_valid(again)
    write_checkpoints(again, 7)
    assert list_remote(store.remote) == ["latest", "step_00000004", "step_00000007"], (
        "milestones outlive the disk they were written to"
    )


def test_interrupted_upload_is_not_used(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write_checkpoints(make_store(tmp_path / "old", url), 2, 4)
    filesystem, root = fsspec.core.url_to_fs(f"{url}/tiny")
    filesystem.pipe_file(f"{root}/step_00000004/weights", b"of")
    filesystem.makedirs(f"{root}/step_00000006", exist_ok=True)
    filesystem.pipe_file(f"{root}/step_00000006/weights", b"of step 6")

    store = open_store(tmp_path / "new", url)
    path = latest_valid(store)
    assert path is not None
    assert path.name == "step_00000002"
    assert caplog.messages[0].startswith(
        f"remote copy {url}/tiny/step_00000004 is damaged (has 2 of 9 bytes of weights)"
    )

    filesystem.pipe_file(f"{root}/step_00000002/weights", b"of")
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"no valid copy is left \(step_00000004: has 2"):
        latest_valid(store)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".restoring.lock"]


def test_run_without_any_copy_has_no_checkpoint(tmp_path: Path, url: str) -> None:
    assert latest_valid(open_store(tmp_path / "run", url)) is None
    assert not (tmp_path / "run").exists()


def test_ranks_that_restore_at_the_same_time_download_once(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul2r")
    write_checkpoints(make_store(tmp_path / "old", url), 2)

    def restore() -> None:
        latest_valid(open_store(tmp_path / "new", url))

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.messages) == 1
    assert find_damage(tmp_path / "new" / "step_00000002") is None


def test_remote_folder_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = make_store(tmp_path / "run", f"{tmp_path}/file")
    with pytest.raises(
        CheckpointError, match=rf"cannot be uploaded to {tmp_path}/file/tiny: .*Not a directory"
    ):
        write_checkpoints(store, 2)
    assert latest_valid(CheckpointStore(tmp_path / "run")) is not None

    store = open_store(tmp_path / "new", "nowhere://bucket")
    with pytest.raises(
        CheckpointError, match="cannot be downloaded from nowhere://bucket/tiny: Protocol"
    ):
        latest_valid(store)
