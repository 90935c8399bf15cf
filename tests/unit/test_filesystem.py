"""Atomic writes, locks between processes, and digests of files."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ul2r.filesystem import (
    file_lock,
    is_locked,
    remove,
    sha256_of,
    staged_file,
    staging_dir,
    suggest_path,
    write_atomically,
)

HOLD = """
import sys
from pathlib import Path
from ul2r.filesystem import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path, order = tmp_path / "store", list[str]()
    assert not is_locked(path)

    def second() -> None:
        with file_lock(path):
            order.append("second")

    with file_lock(path):
        assert is_locked(path)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert not is_locked(path)


def test_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(tmp_path / "store")
        holder.kill()
        holder.wait()
        assert not is_locked(tmp_path / "store")


def test_reader_sees_the_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_atomically(path, "old")
    with staged_file(path) as staging:
        staging.write_text("new")
        assert path.read_text() == "old"
        assert staging.parent == path.parent

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_atomically(path, b"old")

    def fail() -> None:
        with staged_file(path) as staging:
            staging.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for name in ("first", "second"):
        with staging_dir(folder) as staging:
            (staging / name).touch()

    assert [path.name for path in folder.iterdir()] == ["second"]

    def fail() -> None:
        with staging_dir(folder) as staging:
            (staging / "third").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [folder]


def test_digest_equals_that_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 999)
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert sha256_of(path) == printed.stdout.split()[0]


def replace_with_new(folder: Path) -> None:
    """Let a new version of a folder replace it."""
    with staging_dir(folder) as staging:
        (staging / "new").touch()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_crash_while_a_folder_is_replaced_loses_neither_version(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    with staging_dir(folder) as staging:
        (staging / "old").touch()
    if not can_exchange:
        # As NFS answers renameat2 with RENAME_EXCHANGE.
        monkeypatch.setattr("ul2r.filesystem._exchange", lambda *_: False)

    rename = Path.rename

    def die(source: Path, target: Path) -> Path:
        if source != folder:
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            replace_with_new(folder)

    def write_nothing() -> None:
        with staging_dir(folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_nothing()
    assert [path.name for path in folder.iterdir()] == ["new" if can_exchange else "old"]
    replace_with_new(folder)
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths whose removal fails, as that of a folder with open files on NFS does."""
    paths: list[Path] = []
    rmtree = shutil.rmtree

    def refuse(path: Path) -> None:
        if any(path == known or known in path.parents for known in paths):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    return paths


def test_folder_is_replaced_although_the_old_one_cannot_be_removed(
    tmp_path: Path, stubborn: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "export"
    stubborn.append(tmp_path / ".export.previous")
    for name in ("first", "second", "third"):
        with staging_dir(folder) as staging:
            (staging / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    messages = [message for message in caplog.messages if ".export.previous cannot" in message]
    assert len(messages) == 1, "said once"
    assert "Directory not empty" in messages[0]

    stubborn.clear()
    with staging_dir(folder):
        pass
    assert not (tmp_path / ".export.previous").exists(), "tried again"


def test_removal_says_what_it_leaves(
    tmp_path: Path, stubborn: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert remove(tmp_path / "link"), "the link, not what it points to"
    assert folder.is_dir()
    assert remove(tmp_path / "missing")
    stubborn.append(folder)
    assert not remove(folder)
    assert not remove(folder)
    assert caplog.messages == [
        f"{folder} cannot be removed (Directory not empty); it is not needed any more: "
        "remove it by hand if it stays"
    ]
    stubborn.clear()
    assert remove(folder)
    assert not folder.exists()


def test_file_that_the_file_system_cannot_look_up_does_not_count_as_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        patch.setattr(os, "lstat", refuse)
        patch.setattr(os, "unlink", refuse)
        is_gone = remove(path)
    assert not is_gone
    assert len(caplog.messages) == 1
    assert remove(path / "below")
    assert remove(path)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("textt", "text"),
        ("textt/abc.md", "text/abc.md"),
        ("text/abd.md", "text/abc.md"),
        ("text/abc.txt", "text/abc.md"),
    ],
)
def test_nearest_name_is_suggested_for_a_missing_one(
    tmp_path: Path, name: str, nearest: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "abc.md").touch()
    assert suggest_path(tmp_path / name) == f"; did you mean {tmp_path / nearest}?"


@pytest.mark.parametrize("name", ["other", "textt/none.md", "none/of/them", "text/xyz.md"])
def test_nothing_is_suggested_without_a_near_name_that_exists(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "abc.md").touch()
    assert suggest_path(tmp_path / name) == ""
