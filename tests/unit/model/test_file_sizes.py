"""Sizes of a run's files, and how many checkpoints there are at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.model.file_sizes import RunFiles, count_checkpoints, estimate_files, format_size
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.retention import Retention


def simulate(steps: int, every: int, keep: int, keep_every: int | None) -> tuple[int, int]:
    """Count the checkpoints on disk while a run saves and removes them one by one."""
    retention = Retention(keep, keep_every)
    on_disk: set[int] = set()
    most = 0
    for step in range(1, steps + 1):
        if step % every == 0 or step == steps:
            on_disk.add(step)
            most = max(most, len(on_disk))
            on_disk = retention.select_kept(on_disk)
    return most, len(on_disk)


@pytest.mark.parametrize("keep_every", [None, 3, 6, 12, 300])
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7, 30, 31, 36, 37])
def test_checkpoints_are_as_many_as_retention_leaves(
    steps: int, keep: int, keep_every: int | None
) -> None:
    checkpoints = {"every": 3, "keep": keep, "keep_every": keep_every}
    recipe = tiny_recipe(Path("runs"), training={"steps": steps}, checkpoints=checkpoints)
    assert count_checkpoints(recipe) == simulate(steps, 3, keep, keep_every)


@pytest.mark.parametrize(("precision", "weight"), [("fp32", 4), ("bf16", 2)])
def test_sizes_match_arithmetic_by_hand(precision: str, weight: int) -> None:
    """Width 32, 4 layers, 2 of 4 heads for keys, feed-forward 64, 324 tokens padded to 384; untied."""
    recipe = tiny_recipe(
        Path("runs"),
        training={"precision": precision},
        launch={"gpus_per_worker": 1},
        model={"tie_embeddings": False},
    )
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    files = estimate_files(recipe, 324)
    assert files.checkpoint_bytes == (weight + 12) * (4 * layer + 32 + 2 * 384 * 32)
    assert files.export_bytes == weight * (4 * layer + 32 + 2 * 324 * 32)
    assert (files.num_checkpoints, files.num_kept) == (2, 2)  # of steps 3 and 6


def test_an_export_is_written_beside_the_checkpoints_that_are_kept() -> None:
    assert RunFiles(10, num_checkpoints=3, num_kept=2, export_bytes=3).total == 30
    assert RunFiles(10, num_checkpoints=2, num_kept=2, export_bytes=3).total == 23


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (1.25 * 2**30, "1.25 GiB"),
        (46.2 * 2**20, "46.2 MiB"),
        (2**70, "1,048,576 PiB"),
    ],
)
def test_sizes_have_three_digits(size: float, expected: str) -> None:
    assert format_size(size) == expected
