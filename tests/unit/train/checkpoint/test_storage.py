"""Which checkpoint of a run counts: finished, sound, the newest; and which stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ul2r.errors import CheckpointError
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.checksums import write_digests
from ul2r.train.checkpoint.retention import Retention
from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token, latest_valid


def write(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.open(step)
        (store.beside(step) / "weights").write_text(f"of step {step}")
        write_digests(store.beside(step), {})
        store.finish(step)


def written(folder: Path, *steps: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(folder, Retention(keep), acquire_writer_token(folder))
    write(store, *steps)
    return store


def steps_of(store: CheckpointStore) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step_")) for path in store.folder.iterdir() if path.is_dir()
    )


def tear(folder: Path, step: int) -> None:
    (folder / f"step_{step:08d}" / "weights").write_text("of")


def taken(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> tuple[str | None, list[str]]:
    """Name of the checkpoint that is taken, and what is said."""
    caplog.clear()
    path = latest_valid(store)
    return (path.name if path else None), caplog.messages


def test_what_was_not_finished_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, writer_token=acquire_writer_token(tmp_path))
    store.open(6)
    assert taken(store, caplog) == (None, [])
    write(store, 3)
    assert taken(store, caplog) == ("step_00000003", [])


def test_a_torn_checkpoint_is_passed_over_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = written(tmp_path, 2, 4, 6, 8)
    tear(tmp_path, 8)
    shutil.rmtree(tmp_path / "step_00000006")
    assert taken(store, caplog) == (
        "step_00000004",
        [
            f"{tmp_path}: step_00000008 holds 2 of 9 bytes of weights: taking step_00000004 instead",
        ],
    )


def test_the_last_checkpoint_being_gone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = written(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "step_00000004")
    assert taken(store, caplog) == (
        "step_00000002",
        [f"{tmp_path}: step_00000004 is not there: taking step_00000002 instead"],
    )


def test_without_a_sound_checkpoint_nothing_is_begun_anew(tmp_path: Path) -> None:
    store = written(tmp_path, 2, 4)
    tear(tmp_path, 2)
    tear(tmp_path, 4)
    with pytest.raises(
        CheckpointError,
        match=r"no sound checkpoint is left \(step_00000004 holds 2 of 9 .*; step_00000002 holds .*\): put one back",
    ):
        latest_valid(store)


def test_a_pointer_that_was_set_back_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = written(tmp_path, 2, 4, 6)
    (tmp_path / "latest").write_text("step_00000004\n")
    assert taken(store, caplog) == ("step_00000004", [])


@pytest.mark.parametrize("pointer", [b"", b"step_0000", b"\xff\x00"])
def test_with_a_damaged_pointer_the_newest_sound_one_is_taken(
    tmp_path: Path, pointer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = written(tmp_path, 2, 4)
    (tmp_path / "latest").write_bytes(pointer)
    assert taken(store, caplog)[0] == "step_00000004"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_checkpoints_are_kept(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = written(tmp_path, 2, 4, 6, keep=keep)
    assert steps_of(store) == [2, 4, 6][-keep:]
    assert taken(store, caplog) == ("step_00000006", [])


def test_milestones_are_kept_besides(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(2, keep_every=6), acquire_writer_token(tmp_path))
    write(store, *range(2, 21, 2))
    assert steps_of(store) == [6, 12, 18, 20]


def test_milestones_between_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_every=4 is not a multiple of every=3"):
        tiny_recipe(Path("/nowhere"), checkpoints={"every": 3, "keep_every": 4})


def test_a_later_checkpoint_that_was_never_pointed_to_does_not_push_out_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run killed between rename and pointer switch resumes before that checkpoint, and saves at other steps."""
    store = written(tmp_path, 4, keep=1)
    (tmp_path / "step_00000009").mkdir()
    write(store, 6)
    assert steps_of(store) == [6]
    assert taken(store, caplog) == ("step_00000006", [])


def test_a_damaged_checkpoint_does_not_push_out_the_one_that_was_resumed(tmp_path: Path) -> None:
    written(tmp_path, 4, 6, 8)
    tear(tmp_path, 8)
    store = CheckpointStore(tmp_path, Retention(2), acquire_writer_token(tmp_path))
    store.begin(resumed=6)
    assert steps_of(store) == [4, 6, 8], "nothing goes before there is something new"
    write(store, 9)
    assert steps_of(store) == [6, 9]


def test_an_attempt_that_was_replaced_writes_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = written(tmp_path, 2)
    old.open(4)
    new = CheckpointStore(tmp_path, Retention(2), acquire_writer_token(tmp_path))
    for late in (lambda: old.finish(4), lambda: old.open(6), old.begin):
        with pytest.raises(CheckpointError, match="another attempt at this run writes"):
            late()
    new.begin()
    assert steps_of(new) == [2]
    assert taken(new, caplog) == ("step_00000002", [])


def test_attempts_write_in_places_of_their_own(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path, writer_token=acquire_writer_token(tmp_path)) for _ in range(2)]
    assert stores[0].beside(4) != stores[1].beside(4)
