"""Signs of life of a process that builds a streamed store."""

from __future__ import annotations

import os
from pathlib import Path

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
