"""Signs of life of a process that builds a streamed store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ul2r.data.store.segments import WORK_PREFIX, measure_build


def test_shards_and_growing_segments_are_progress(tmp_path: Path) -> None:
    store = tmp_path / "store"
    work_folder = tmp_path / f"{WORK_PREFIX}0123"
    segment = store / "train_01.bin"
    for folder in (store, work_folder):
        folder.mkdir()
    segment.touch()

    def set_old_times() -> None:
        # The system's clock for files may tick too slowly to tell two changes apart.
        for folder in (store, work_folder):
            os.utime(folder, (1, 1))

    set_old_times()
    start = measure_build(store)
    assert measure_build(store) == start
    segment.write_bytes(b"tokens")
    grown = measure_build(store)
    assert grown != start
    (work_folder / "shard_00001.bin").touch()
    assert measure_build(store) != grown


def test_files_that_vanish_while_they_are_measured_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    work_folder = tmp_path / f"{WORK_PREFIX}0123"
    for folder in (store, work_folder):
        folder.mkdir()
    (store / "train_01.bin").write_bytes(b"tokens")
    (store / ".manifest.json.writing").write_bytes(b"{}")
    find, scan = Path.glob, os.scandir

    def find_and_remove(self: Path, pattern: str) -> list[Path]:
        found = list(find(self, pattern))
        work_folder.rmdir()
        return found

    def scan_and_remove(path: Path) -> Iterator[os.DirEntry[str]]:
        if path != store:  # pathlib's own
            return scan(path)
        entries = list(scan(path))
        (store / ".manifest.json.writing").unlink()
        return iter(entries)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scan_and_remove)
        patch.setattr(Path, "glob", find_and_remove)
        numbers = measure_build(store)
    assert numbers[1:] == (len(b"tokens"),), "the work folder and the staging file are gone"
