"""Remote copies of checkpoints: uploaded, retained, and downloaded only if they are complete."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
    token = acquire_writer_token(folder)
    remote = RemoteCheckpoints(url, "tiny", token)
    return CheckpointStore(folder, Retention(keep, keep_every), token, remote)


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
    assert list_remote(store.remote) == ["latest", "owner", "step_00000004", "step_00000006"]

    again = make_store(tmp_path / "new", url, keep=1, keep_every=4)
    latest_valid(again)
    again.start_attempt(6)
    write_checkpoints(again, 7)
    assert list_remote(store.remote) == ["latest", "owner", "step_00000004", "step_00000007"], (
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


def test_run_of_the_same_name_in_another_storage_is_refused(tmp_path: Path, url: str) -> None:
    write_checkpoints(make_store(tmp_path / "theirs", url), 2, 4)
    # Its own checkpoints are from before the remote folder was set.
    ours = make_store(tmp_path / "ours", f"{tmp_path}/elsewhere")
    write_checkpoints(ours, 3)
    before = list_remote(RemoteCheckpoints(url, "tiny"))

    ours = make_store(tmp_path / "ours", url)
    refused = f"{url}/tiny has the copies of a run of the same name in another storage: set check"
    with pytest.raises(CheckpointError, match=refused):
        ours.start_attempt(3)
    with pytest.raises(CheckpointError, match=refused):
        write_checkpoints(ours, 5)
    assert list_remote(RemoteCheckpoints(url, "tiny")) == before
    path = latest_valid(open_store(tmp_path / "new", url))
    assert path is not None
    assert (path / "weights").read_text() == "of step 4"


def test_later_attempt_takes_over_and_the_earlier_one_is_refused(tmp_path: Path, url: str) -> None:
    old = make_store(tmp_path / "old", url)
    old.start_attempt()
    write_checkpoints(old, 2)

    # On another disk: it continues the copy. On the same one: its last checkpoint may not have been copied.
    moved = make_store(tmp_path / "moved", url)
    assert latest_valid(moved) == tmp_path / "moved" / "step_00000002"
    moved.start_attempt(2)
    write_checkpoints(moved, 4)
    moved.create_staging_dir(6)
    write_digests(moved.staging_dir(6), {})
    moved.publish(6)
    again = make_store(tmp_path / "moved", url)
    again.start_attempt(6)
    write_checkpoints(again, 8)

    with pytest.raises(CheckpointError, match="another attempt at this run, maybe from another st"):
        write_checkpoints(old, 6)
    assert again.remote is not None
    assert list_remote(again.remote) == ["latest", "owner", "step_00000004", "step_00000008"]


def test_copies_of_earlier_versions_have_no_owner_and_are_continued(
    tmp_path: Path, url: str
) -> None:
    write_checkpoints(make_store(tmp_path / "run", url), 2)
    filesystem, root = fsspec.core.url_to_fs(f"{url}/tiny")
    filesystem.rm_file(f"{root}/owner")
    (tmp_path / "run" / "owner").write_text("0123456789abcdef")

    store = make_store(tmp_path / "run", url)
    store.start_attempt(2)
    write_checkpoints(store, 4)
    assert filesystem.cat_file(f"{root}/latest") == b"step_00000004"
    assert store.writer_token is not None
    assert store.writer_token.startswith("0123456789abcdef.")


def test_remote_folder_that_is_away_when_a_run_starts_is_claimed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = make_store(tmp_path / "run", f"{tmp_path}/file")
    store.start_attempt()
    assert caplog.messages[0].startswith("training starts all the same: checkpoints cannot be")
    (tmp_path / "file").unlink()
    write_checkpoints(store, 2)
    assert (tmp_path / "file/tiny/owner").read_text() == store.writer_token


class KeepingFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store that lets nobody delete while `is_locked`, with an error that is no OSError."""

    protocol = "keeping"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    is_locked = True

    class DeniedError(Exception):
        """As s3fs and gcsfs have some."""

    DeniedError.__module__ = "gcsfs.retry"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("keeping:")))

    def rm(self, path: str, recursive: bool = False, **_: object) -> None:
        """Remove a folder."""
        if self.is_locked:
            raise self.DeniedError("storage.objects.delete is denied")
        super().rm(path, recursive=recursive)

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        if self.is_locked:
            raise self.DeniedError("storage.objects.delete is denied")
        super().rm_file(path)


fsspec.register_implementation("keeping", KeepingFileSystem, clobber=True)


def test_old_copy_that_cannot_be_removed_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "run", "keeping://far", keep=1)
    write_checkpoints(store, 2, 4, 6)
    write_checkpoints(store, 6)
    names = [message.split()[3] for message in caplog.messages]
    assert names == [f"keeping://far/tiny/step_0000000{step}" for step in (2, 4)]
    assert "storage.objects.delete is denied" in caplog.text

    monkeypatch.setattr(KeepingFileSystem, "is_locked", False)
    write_checkpoints(store, 8)
    assert store.remote is not None
    assert list_remote(store.remote) == ["latest", "owner", "step_00000008"]


def test_copy_chooses_neither_what_is_read_nor_where_it_is_written(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoints(make_store(tmp_path / "old", url), 2, 4)
    filesystem, root = fsspec.core.url_to_fs(f"{url}/tiny")
    filesystem.pipe_file(f"{root}/step_00000002/.extra", b"not in the digests")
    digests = json.loads(filesystem.cat_file(f"{root}/step_00000004/digests.json"))
    digests["files"]["../../planted"] = digests["files"]["weights"]
    filesystem.pipe_file(f"{root}/step_00000004/digests.json", json.dumps(digests).encode())
    filesystem.pipe_file(f"{root}/planted", b"of step 4")

    path = latest_valid(open_store(tmp_path / "new" / "run", url))
    assert path == tmp_path / "new" / "run" / "step_00000002"
    assert "names '../../planted', which is not a file of the checkpoint" in caplog.text
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "digests.json", "weights"]
    assert not list(tmp_path.joinpath("new").rglob("planted"))


def test_copy_that_latest_names_but_is_gone_is_skipped(tmp_path: Path, url: str) -> None:
    write_checkpoints(make_store(tmp_path / "old", url), 2, 4)
    filesystem, root = fsspec.core.url_to_fs(f"{url}/tiny")
    filesystem.rm(f"{root}/step_00000004", recursive=True)
    path = latest_valid(open_store(tmp_path / "new", url))
    assert path is not None
    assert path.name == "step_00000002"
