"""Layouts that a run shrinks to when its cluster has lost machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ul2r.launch.ray_train.elastic import shrink_layout
from ul2r.testing.recipes import tiny_recipe


@pytest.mark.parametrize(
    ("launch", "cpus", "workers"),
    [
        ({"min_workers": 2}, 12, 8),  # 8 workers and 4 data tasks of half a CPU
        ({"min_workers": 2}, 9, 4),  # 6 workers would be 3 replicas, which do not divide 8 rows
        ({"min_workers": 2}, 3, 2),
        ({"min_workers": 2}, 2, None),  # a replica takes 2 workers and half a CPU
        ({"min_workers": 4}, 4, None),
        ({}, 9, None),
        ({"min_workers": 2, "cpus_per_data_task": 0, "cpus_per_worker": 2}, 9, 4),
        ({"min_workers": 2, "device_memory_gib": 1e-4}, 9, None),
    ],
)
def test_run_shrinks_to_the_most_whole_replicas_that_divide_the_batch(
    launch: dict[str, Any], cpus: float, workers: int | None
) -> None:
    recipe = tiny_recipe(
        Path("/nowhere"),
        parallel={"num_workers": 16, "tensor": 2},
        training={"micro_batch_size": 1},
        launch=launch,
    )
    smaller = shrink_layout(recipe, {"CPU": cpus}, vocabulary_size=512)
    assert (smaller.parallel.num_workers if smaller else None) == workers
    if smaller is not None:
        assert smaller.model_copy(update={"parallel": recipe.parallel}) == recipe


def test_lost_gpus_count() -> None:
    recipe = tiny_recipe(
        Path("/nowhere"),
        parallel={"num_workers": 4},
        launch={"min_workers": 1, "gpus_per_worker": 1},
    )
    smaller = shrink_layout(recipe, {"CPU": 64, "GPU": 3}, vocabulary_size=512)
    assert smaller is not None
    assert smaller.parallel.num_workers == 2


def test_min_workers_above_num_workers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"launch\.min_workers=3 is more than parallel\.num_workers=2"
    ):
        tiny_recipe(Path("/nowhere"), parallel={"num_workers": 2}, launch={"min_workers": 3})
