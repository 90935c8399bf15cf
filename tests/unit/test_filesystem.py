"""Atomic writes, locks between processes, and digests of files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ul2r.filesystem import (
    file_lock,
    is_locked,
    sha256_of,
    staged_file,
    staging_dir,
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
