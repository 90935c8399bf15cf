"""Measure what Ray Data delivers to one reader, relative to the same batches built in the reader's own process.

    python benchmarks/loader.py

Rows have 2,048 positions of the `ul2r` mixture, from a token store on disk, on a local Ray cluster. One JSON line:

    source_tokens_per_second   raw tokens delivered to a reader that takes batches as fast as they come
    in_process_ratio           this rate divided by that of the same batches built in process
    cpu_seconds_per_million    CPU time of all processes per million raw tokens delivered
    first_batch_seconds        time to the first batch, with Ray's workers not yet started
    resume_seconds             the same at sample index 10**9, with the workers started
    ray_start_seconds          of it, the time Ray takes to hand the first block of any data set to a reader
    coordinator_cpu_share      fraction of a core used by Ray's coordinator while a slow reader holds it back
    object_store_peak_bytes    largest size of Ray's object store
    spilled_bytes              bytes that Ray moved from there to disk
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import deque
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
FEW_STEPS = 64
MANY_STEPS = 1500
"""Every reader reads to the last step of its run: an abandoned one would outlive Ray."""
SLOW_SECONDS = 15
SLOW_BATCHES_PER_SECOND = 2


def make_recipe(folder: Path, first_index: int, num_steps: int) -> Recipe:
    """Return a recipe with rows of the paper's length, over a store much longer than a row."""
    return tiny_recipe(
        folder,
        data={"num_sentinels": 256},
        objective={"sequence_length": 2048},
        training={
            "steps": first_index // BATCH_ROWS + num_steps,
            "global_batch_size": BATCH_ROWS,
            "micro_batch_size": 1,
        },
    )


def count_source_tokens(recipe: Recipe, batch: Batch) -> int:
    """Return the number of raw tokens that a batch was built from."""
    mixture = recipe.objective.mixture
    denoiser_ids = batch.denoiser_ids[:, 0].tolist()
    return sum(recipe.objective.raw_length(mixture[index]) for index in denoiser_ids)


def iter_ray_batches(recipe: Recipe, first_index: int) -> Iterator[Batch]:
    """Iterate over batches as a worker gets them."""
    batches = range(first_index // BATCH_ROWS, recipe.training.steps)
    (iterator,) = loader.split_for_replicas(loader.make_dataset(recipe, batches, 1), 1)
    return loader.iter_batches(iterator, recipe, batches, 0, 1)


def iter_local_batches(recipe: Recipe) -> Iterator[Batch]:
    """Build the same batches in this process."""
    builder = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store))
    return map(builder.build, range(recipe.training.steps))


def measure_rate(recipe: Recipe, batches: Iterator[Batch]) -> tuple[float, int]:
    """Read from the second batch to the last, doing nothing else.

    Returns:
        Raw tokens per second, and their number.
    """
    next(batches)
    start = time.perf_counter()
    num_tokens = sum(count_source_tokens(recipe, batch) for batch in batches)
    return num_tokens / (time.perf_counter() - start), num_tokens


def time_first_batch(recipe: Recipe, first_index: int) -> float:
    """Return the seconds until the first batch arrives."""
    start = time.perf_counter()
    batches = iter_ray_batches(recipe, first_index)
    next(batches)
    seconds = time.perf_counter() - start
    exhaust(batches)
    return seconds


def exhaust(batches: Iterator[Batch]) -> None:
    """Read the remaining batches."""
    deque(batches, maxlen=0)


def time_ray_start() -> float:
    """Return the seconds until Ray Data, with workers started, hands a tiny block to a reader."""
    start = time.perf_counter()
    (iterator,) = ray.data.range(BATCH_ROWS, override_num_blocks=1).streaming_split(1)
    batches = iter(iterator.iter_batches(batch_size=BATCH_ROWS))
    next(batches)
    seconds = time.perf_counter() - start
    assert next(batches, None) is None
    return seconds


def read_cpu_seconds() -> float:
    """Return the CPU time of this process and its descendants."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def find_coordinator() -> psutil.Process:
    """Return the process of Ray Data's newest coordinator."""
    coordinators = [
        process
        for process in psutil.Process().children(recursive=True)
        if "SplitCoordinator" in " ".join(process.cmdline())
    ]
    return max(coordinators, key=lambda process: process.create_time())


def measure_coordinator_share(batches: Iterator[Batch]) -> float:
    """Return the fraction of a core that the coordinator uses while the reader is slow, as training normally is."""

    def read_slowly(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            next(batches)
            time.sleep(1 / SLOW_BATCHES_PER_SECOND)

    read_slowly(SLOW_SECONDS / 2)  # until all prefetching is done
    coordinator = find_coordinator()
    before = coordinator.cpu_times()
    start = time.perf_counter()
    read_slowly(SLOW_SECONDS)
    after = coordinator.cpu_times()
    seconds = time.perf_counter() - start

    exhaust(batches)
    return float(after.user + after.system - before.user - before.system) / seconds


@contextmanager
def watch_object_store() -> Iterator[dict[str, int]]:
    """Record the largest size of the object store and the spilled bytes while the block runs."""
    usage = {"peak": 0, "spilled": 0}
    is_done = threading.Event()

    def watch() -> None:
        (node,) = ray.nodes()
        while not is_done.wait(0.2):
            stats: Any = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            usage["peak"] = max(usage["peak"], stats.object_store_bytes_used)
            usage["spilled"] = stats.spilled_bytes_total

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield usage
    finally:
        is_done.set()
        watcher.join()


def measure(folder: Path) -> dict[str, float]:
    """Return the numbers to print."""
    make_tiny_store(folder / "store", num_documents=2000, num_sentinels=256, vocabulary_size=1024)
    few = make_recipe(folder, 0, FEW_STEPS)
    many = make_recipe(folder, 0, MANY_STEPS)
    far = make_recipe(folder, FAR_INDEX, FEW_STEPS)
    with connect_ray(cpus=2), watch_object_store() as usage:
        # In this order: only the first measurement includes the start of Ray's workers.
        first_batch = time_first_batch(few, 0)
        resume = time_first_batch(far, FAR_INDEX)
        ray_start = time_ray_start()
        local_rate, _ = measure_rate(many, iter_local_batches(many))

        cpu_before = read_cpu_seconds()
        ray_rate, num_tokens = measure_rate(many, iter_ray_batches(many, 0))
        cpu_seconds = read_cpu_seconds() - cpu_before
        coordinator_share = measure_coordinator_share(iter_ray_batches(many, 0))

    return {
        "source_tokens_per_second": round(ray_rate),
        "in_process_ratio": round(ray_rate / local_rate, 3),
        "cpu_seconds_per_million": round(cpu_seconds / num_tokens * 1e6, 3),
        "first_batch_seconds": round(first_batch, 2),
        "resume_seconds": round(resume, 2),
        "ray_start_seconds": round(ray_start, 2),
        "coordinator_cpu_share": round(coordinator_share, 3),
        "object_store_peak_bytes": usage["peak"],
        "spilled_bytes": usage["spilled"],
    }


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "loader", **measure(Path(folder))}))


if __name__ == "__main__":
    main()
