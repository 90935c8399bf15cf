"""Selection of a run's checkpoint, retention, and fencing of attempts that were replaced."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ul2r.errors import CheckpointError
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.retention import Retention
from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token, latest_valid


def write_checkpoints(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.create_staging_dir(step)
        (store.staging_dir(step) / "weights").write_text(f"of step {step}")
        write_digests(store.staging_dir(step), {})
        store.publish(step)


def make_store(folder: Path, *steps: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(folder, Retention(keep), acquire_writer_token(folder))
    write_checkpoints(store, *steps)
    return store


def list_steps(store: CheckpointStore) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step_")) for path in store.folder.iterdir() if path.is_dir()
    )


def truncate(folder: Path, step: int) -> None:
    (folder / f"step_{step:08d}" / "weights").write_text("of")


def find_latest(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> tuple[str | None, list[str]]:
    """Return the name of the checkpoint that is used, and the messages logged."""
    caplog.clear()
    path = latest_valid(store)
    return (path.name if path else None), caplog.messages


def test_unfinished_checkpoint_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, writer_token=acquire_writer_token(tmp_path))
    store.create_staging_dir(6)
    assert find_latest(store, caplog) == (None, [])

    write_checkpoints(store, 3)
    assert find_latest(store, caplog) == ("step_00000003", [])


def test_truncated_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, 2, 4, 6, 8)
    truncate(tmp_path, 8)
    shutil.rmtree(tmp_path / "step_00000006")

    assert find_latest(store, caplog) == (
        "step_00000004",
        [f"{tmp_path}: step_00000008 has 2 of 9 bytes of weights: using step_00000004 instead"],
    )


def test_missing_latest_checkpoint_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "step_00000004")

    assert find_latest(store, caplog) == (
        "step_00000002",
        [f"{tmp_path}: step_00000004 does not exist: using step_00000002 instead"],
    )


def test_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path: Path) -> None:
    store = make_store(tmp_path, 2, 4)
    truncate(tmp_path, 2)
    truncate(tmp_path, 4)

    with pytest.raises(
        CheckpointError,
        match=r"no valid checkpoint is left \(step_00000004 has 2 of 9 .*; step_00000002 has .*\): restore one",
    ):
        latest_valid(store)


def test_pointer_that_was_reset_to_an_earlier_step_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, 2, 4, 6)
    (tmp_path / "latest").write_text("step_00000004\n")
    assert find_latest(store, caplog) == ("step_00000004", [])


@pytest.mark.parametrize("pointer", [b"", b"step_0000", b"\xff\x00"])
def test_newest_valid_checkpoint_is_used_if_the_pointer_is_damaged(
    tmp_path: Path, pointer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, 2, 4)
    (tmp_path / "latest").write_bytes(pointer)
    assert find_latest(store, caplog)[0] == "step_00000004"


@pytest.mark.parametrize("keep", [1, 2])
def test_last_checkpoints_are_kept(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, 2, 4, 6, keep=keep)
    assert list_steps(store) == [2, 4, 6][-keep:]
    assert find_latest(store, caplog) == ("step_00000006", [])


def test_milestones_are_kept_in_addition(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(2, keep_every=6), acquire_writer_token(tmp_path))
    write_checkpoints(store, *range(2, 21, 2))
    assert list_steps(store) == [6, 12, 18, 20]


def test_milestones_between_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_every=4 is not a multiple of every=3"):
        tiny_recipe(Path("/nowhere"), checkpoints={"every": 3, "keep_every": 4})


def test_later_checkpoint_that_latest_never_named_does_not_count_as_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run killed between rename and pointer switch resumes before that checkpoint, and saves at other steps."""
    store = make_store(tmp_path, 4, keep=1)
    (tmp_path / "step_00000009").mkdir()
    write_checkpoints(store, 6)

    assert list_steps(store) == [6]
    assert find_latest(store, caplog) == ("step_00000006", [])


def test_damaged_checkpoint_does_not_count_as_kept_instead_of_the_resumed_one(
    tmp_path: Path,
) -> None:
    make_store(tmp_path, 4, 6, 8)
    truncate(tmp_path, 8)
    store = CheckpointStore(tmp_path, Retention(2), acquire_writer_token(tmp_path))

    store.start_attempt(resumed_step=6)
    assert list_steps(store) == [4, 6, 8], "nothing is removed before a new checkpoint exists"

    write_checkpoints(store, 9)
    assert list_steps(store) == [6, 9]


def test_attempt_that_was_replaced_can_no_longer_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = make_store(tmp_path, 2)
    old.create_staging_dir(4)
    new = CheckpointStore(tmp_path, Retention(2), acquire_writer_token(tmp_path))

    for write in (lambda: old.publish(4), lambda: old.create_staging_dir(6), old.start_attempt):
        with pytest.raises(CheckpointError, match="another attempt at this run writes"):
            write()

    new.start_attempt()
    assert list_steps(new) == [2]
    assert find_latest(new, caplog) == ("step_00000002", [])


def test_new_attempt_leaves_a_token_that_is_being_written_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path, 2)
    token = tmp_path / ".owner.0123456789ab.writing"
    token.touch()
    store.start_attempt()
    assert token.exists()


def test_writer_token_fences_attempts_of_earlier_versions(tmp_path: Path) -> None:
    """They write and compare the same file."""
    store = make_store(tmp_path, 2)
    assert (tmp_path / "owner").read_text() == store.writer_token

    (tmp_path / "owner").write_text("token of another version")
    with pytest.raises(CheckpointError, match="another attempt at this run writes"):
        store.create_staging_dir(4)


def test_attempts_have_staging_folders_of_their_own(tmp_path: Path) -> None:
    stores = [
        CheckpointStore(tmp_path, writer_token=acquire_writer_token(tmp_path)) for _ in range(2)
    ]
    assert stores[0].staging_dir(4) != stores[1].staging_dir(4)


@pytest.fixture
def open_files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that another process holds open on NFS: their folders can be renamed, and not be removed."""
    names: set[str] = set()
    rmtree = shutil.rmtree

    def refuse(path: Path) -> None:
        if names & {file.name for file in path.iterdir()}:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    return names


def test_old_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, open_files: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, keep=2)
    open_files.add("weights")
    write_checkpoints(store, 2, 4, 6, 8)
    assert [path.name for path in store.list_checkpoints()] == ["step_00000008", "step_00000006"]
    assert find_latest(store, caplog) == ("step_00000008", [])
    leftovers = sorted(path.name for path in tmp_path.glob(".step_*"))
    assert [name.split(".")[1] for name in leftovers] == ["step_00000002", "step_00000004"]

    open_files.clear()
    write_checkpoints(store, 10)
    assert list_steps(store) == [8, 10]


def test_removal_that_fails_is_said_once(
    tmp_path: Path, open_files: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, keep=1)
    open_files.add("weights")
    write_checkpoints(store, 2, 4)
    for _ in range(3):
        store.remove_expired()
    (line,) = caplog.messages
    assert "step_00000002" in line
    assert "cannot be removed (Directory not empty)" in line


def test_leftovers_and_a_failed_checkpoint_that_cannot_be_removed_end_no_run(
    tmp_path: Path, open_files: set[str]
) -> None:
    store = make_store(tmp_path, 2)
    open_files.add("weights")
    store.create_staging_dir(4)
    (store.staging_dir(4) / "weights").touch()
    store.discard(4)
    store.start_attempt(2)
    assert store.staging_dir(4).exists()
    open_files.clear()
    store.start_attempt(2)
    assert list_steps(store) == [2]


def test_checkpoint_is_written_again_although_the_damaged_one_cannot_be_removed(
    tmp_path: Path, open_files: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path, 2, 4)
    truncate(tmp_path, 4)
    store = CheckpointStore(tmp_path, Retention(9), acquire_writer_token(tmp_path))
    store.start_attempt(2)
    open_files.add("weights")
    write_checkpoints(store, 4)
    assert find_latest(store, caplog) == ("step_00000004", [])
