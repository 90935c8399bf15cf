"""What Ray Data delivers to one reader, beside the same rows made in the reader's own process.

    python benchmarks/pipeline.py

Rows of 2,048 positions of the `ul2r` mixture, from a token store on disk, on a local Ray cluster. One JSON line:

    source_tokens_per_second   raw tokens delivered to a reader that takes rows as fast as they come
    in_process_ratio           share of the rate of the same rows made in process
    cpu_seconds_per_million    CPU time of all processes per million raw tokens delivered
    first_batch_seconds        from nothing to the first batch, Ray's workers not yet started
    resume_seconds             the same at sample index 10**9, the workers started
    ray_start_seconds          of them, what Ray takes to hand the first block of any data set to a reader
    coordinator_cpu_share      of one core, by Ray's coordinator while a slow reader holds it back
    object_store_peak_bytes    most that lay in Ray's object store
    spilled_bytes              what Ray moved from there to disk
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import node_stats

from ul2r.config import Recipe
from ul2r.data import loader
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.objective import Batch
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.recipes import tiny_recipe

BATCH_ROWS = 32
FAR_INDEX = 10**9
FEW_STEPS, MANY_STEPS = 64, 1500
"""Every reader reads to its run's last step: one that was left alone would outlive Ray."""
SLOW_SECONDS = 15
SLOW_BATCHES_PER_SECOND = 2


def recipe_in(folder: Path, first_index: int, steps: int) -> Recipe:
    """Rows of the paper's length over a store that is far longer than a row."""
    return tiny_recipe(
        folder,
        data={"num_sentinels": 256},
        objective={"sequence_length": 2048},
        training={
            "steps": first_index // BATCH_ROWS + steps,
            "global_batch_size": BATCH_ROWS,
            "micro_batch_size": 1,
        },
    )


def source_tokens(recipe: Recipe, rows: Batch) -> int:
    """Raw tokens that rows were made of."""
    mixture = recipe.objective.mixture
    return sum(recipe.objective.raw_length(mixture[d]) for d in rows.denoiser_ids[:, 0].tolist())


def ray_rows(recipe: Recipe, first_index: int) -> Iterator[Batch]:
    """Rows as a worker gets them."""
    step = first_index // BATCH_ROWS
    batches = range(step, recipe.training.steps)
    (iterator,) = loader.split_for_replicas(loader.make_dataset(recipe, batches, 1), 1)
    return loader.iter_batches(iterator, recipe, batches, 0, 1)


def own_rows(recipe: Recipe) -> Iterator[Batch]:
    """The same rows, made here."""
    batches = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store))
    return map(batches.build, range(recipe.training.steps))


def rate(recipe: Recipe, rows: Iterator[Batch]) -> tuple[float, int]:
    """Raw tokens a second of a reader that does nothing else, from its second batch to its last, and how many."""
    next(rows)
    began = time.perf_counter()
    tokens = sum(source_tokens(recipe, batch) for batch in rows)
    return tokens / (time.perf_counter() - began), tokens


def first_batch(recipe: Recipe, first_index: int) -> float:
    """Seconds until the first batch is there."""
    began = time.perf_counter()
    rows = ray_rows(recipe, first_index)
    next(rows)
    seconds = time.perf_counter() - began
    read_to_the_end(rows)
    return seconds


def read_to_the_end(rows: Iterator[Batch]) -> None:
    """Take what is left."""
    for _ in rows:
        pass


def ray_start() -> float:
    """Seconds until Ray Data, its workers started, has handed a block of next to nothing to a reader."""
    began = time.perf_counter()
    (iterator,) = ray.data.range(BATCH_ROWS, override_num_blocks=1).streaming_split(1)
    batches = iter(iterator.iter_batches(batch_size=BATCH_ROWS))
    next(batches)
    seconds = time.perf_counter() - began
    assert next(batches, None) is None
    return seconds


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started."""
    own = psutil.Process()
    spent = 0.0
    for process in (own, *own.children(recursive=True)):
        times = process.cpu_times()
        spent += times.user + times.system
    return spent


def coordinator() -> psutil.Process:
    """Ray Data's coordinator."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if "SplitCoordinator" in " ".join(process.cmdline())
    ]
    return max(found, key=lambda process: process.create_time())


def held_back_share(rows: Iterator[Batch]) -> float:
    """Share of a core that the coordinator takes while the reader is slow, which is the normal state of training."""

    def read_slowly(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            next(rows)
            time.sleep(1 / SLOW_BATCHES_PER_SECOND)

    read_slowly(SLOW_SECONDS / 2)  # what it may prefetch is there after that
    process = coordinator()
    before, began = process.cpu_times(), time.perf_counter()
    read_slowly(SLOW_SECONDS)
    after = process.cpu_times()
    seconds = time.perf_counter() - began
    read_to_the_end(rows)
    return float(after.user + after.system - before.user - before.system) / seconds


@contextmanager
def object_store() -> Iterator[dict[str, int]]:
    """Most bytes in the object store, and bytes spilled, while the block runs."""
    found, ended = {"peak": 0, "spilled": 0}, threading.Event()

    def watch() -> None:
        (node,) = ray.nodes()
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        while not ended.wait(0.2):
            stats: Any = node_stats(*address).store_stats
            found["peak"] = max(found["peak"], stats.object_store_bytes_used)
            found["spilled"] = stats.spilled_bytes_total

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def measure(folder: Path) -> dict[str, float]:
    """The figures of the line that is printed."""
    make_tiny_store(folder / "store", num_documents=2000, num_sentinels=256, vocabulary_size=1024)
    few, many = (recipe_in(folder, 0, steps) for steps in (FEW_STEPS, MANY_STEPS))
    far = recipe_in(folder, FAR_INDEX, FEW_STEPS)
    with connect_ray(cpus=2), object_store() as store:
        first = first_batch(few, 0)
        resumed, alone = first_batch(far, FAR_INDEX), ray_start()
        own, _ = rate(many, own_rows(many))
        cpu = cpu_seconds()
        delivered, tokens = rate(many, ray_rows(many, 0))
        cpu = cpu_seconds() - cpu
        share = held_back_share(ray_rows(many, 0))
    return {
        "source_tokens_per_second": round(delivered),
        "in_process_ratio": round(delivered / own, 3),
        "cpu_seconds_per_million": round(cpu / tokens * 1e6, 3),
        "first_batch_seconds": round(first, 2),
        "resume_seconds": round(resumed, 2),
        "ray_start_seconds": round(alone, 2),
        "coordinator_cpu_share": round(share, 3),
        "object_store_peak_bytes": store["peak"],
        "spilled_bytes": store["spilled"],
    }


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "pipeline", **measure(Path(folder))}))


if __name__ == "__main__":
    main()
