"""Time to save and load a checkpoint, compared with a plain write and read of the same bytes.

    python benchmarks/checkpoint.py [FOLDER]

Weights and optimizer state of a model of 26 million parameters, in one process, on the disk of FOLDER (default: a
temporary folder). Both writes are synced to the disk, and both reads come from the disk: the page cache is dropped
before. Prints one JSON line:

    save_ratio                 throughput of a save, from the call to the switched pointer, by that of the plain write
    load_ratio                 throughput of a load, all digests verified, by that of the plain read
    stall_seconds              time that an asynchronous save keeps the loop waiting
    synchronous_seconds        time of a synchronous save
    slowdown_seconds           additional time, in all, of the steps that are taken while files are written
    step_seconds               time of one step
    bytes                      size of the checkpoint
    save_bytes_per_second, plain_write_bytes_per_second, load_bytes_per_second, plain_read_bytes_per_second

All are measured in turns in one process; each figure is the median of its turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.recipes import tiny_recipe

NUM_TURNS = 5
CHUNK_BYTES = 2**24


def time_call(work: Callable[[], object]) -> float:
    """Return the wall time of a call in seconds."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def write_plainly(folder: Path, contents: list[bytes]) -> None:
    """Write files in parallel and sync them to the disk."""

    def write(number: int, content: bytes) -> None:
        with (folder / f"plain_{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, range(len(contents)), contents))


def read_plainly(files: list[Path]) -> None:
    """Read files in parallel."""

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass

    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(read, files))


def drop_from_cache(files: list[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SavedRun:
    """A run of one process that repeats the same step, and saves."""

    def __init__(self, recipe: Recipe) -> None:
        from ul2r.train.checkpoint.checkpointer import Checkpointer
        from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token
        from ul2r.train.mesh import Mesh
        from ul2r.train.step import TrainStep

        self.recipe = recipe
        self.dataset = open_dataset(recipe.storage_paths.store)
        mesh = Mesh.join(recipe.parallel)
        self.train_step = TrainStep(recipe, mesh, self.dataset.vocabulary.size)
        self.batch = BatchBuilder(recipe, self.dataset).build(0, 0, 1)
        self.folder = recipe.paths.checkpoints
        self.store = CheckpointStore.from_recipe(
            recipe, writer_token=acquire_writer_token(self.folder)
        )
        self.logged: list[dict[str, float]] = []
        self.checkpointer = Checkpointer(
            self.store,
            mesh,
            log=lambda _, metrics: self.logged.append(dict(metrics)),
            flush=lambda: None,
            heartbeat=lambda: None,
            asynchronous=True,
            stall_timeout_s=recipe.guards.hang_timeout_s,
        )

    def step(self) -> None:
        """Take one step."""
        take_step(self.train_step, 0, self.batch)

    def save(self) -> None:
        """Start a save."""
        from ul2r.train.checkpoint.metadata import CheckpointInfo

        info = CheckpointInfo.from_recipe(self.recipe, self.dataset, step=len(self.logged) + 1)
        self.checkpointer.save(self.train_step, info)

    def save_and_wait(self) -> None:
        """Save and wait for the end."""
        self.save()
        self.checkpointer.wait()

    def load(self) -> None:
        """Find the latest valid checkpoint and load it."""
        from ul2r.train.checkpoint.sharded_state import load_checkpoint

        path = self.checkpointer.latest_valid(self.store)
        assert path is not None
        load_checkpoint(path, self.train_step, optimizer=True)

    def list_files(self) -> list[Path]:
        """Return the files of the last checkpoint."""
        return [path for path in self.store.list_checkpoints()[0].iterdir() if path.is_file()]

    def measure_slowdown(self, step_s: float) -> float:
        """Take steps during a save; return the seconds that they take in addition to `step_s` each."""
        num_saves = len(self.logged)
        slowdown_s = 0.0
        self.save()
        while len(self.logged) == num_saves:
            slowdown_s += time_call(self.step) - step_s
            self.checkpointer.poll()
        return slowdown_s


def measure(recipe: Recipe) -> dict[str, float]:
    """Return the figures of the printed line; runs in the process of the run."""
    run = SavedRun(recipe)
    # A warm-up step, and a save whose files the first plain write copies.
    run.step()
    run.save_and_wait()

    turns = []
    for _ in range(NUM_TURNS):
        contents = [path.read_bytes() for path in run.list_files()]
        turn = {
            "write": time_call(partial(write_plainly, run.folder, contents)),
            "save": time_call(run.save_and_wait),
        }
        drop_from_cache(run.list_files())
        turn["read"] = time_call(partial(read_plainly, run.list_files()))
        drop_from_cache(run.list_files())
        turn["load"] = time_call(run.load)
        turn["step"] = time_call(run.step)
        turn["slowdown"] = run.measure_slowdown(turn["step"])
        turns.append(turn | {"stall": run.logged[-1]["checkpoint/stall_seconds"]})

    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    size = run.logged[-1]["checkpoint/bytes"]
    return {
        "save_ratio": round(medians["write"] / medians["save"], 3),
        "load_ratio": round(medians["read"] / medians["load"], 3),
        "stall_seconds": round(medians["stall"], 3),
        "synchronous_seconds": round(medians["save"], 3),
        "slowdown_seconds": round(medians["slowdown"], 3),
        "step_seconds": round(medians["step"], 3),
        "bytes": size,
        "save_bytes_per_second": round(size / medians["save"]),
        "plain_write_bytes_per_second": round(size / medians["write"]),
        "load_bytes_per_second": round(size / medians["load"]),
        "plain_read_bytes_per_second": round(size / medians["read"]),
    }


def main() -> None:
    """Measure and print the figures."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        make_tiny_store(Path(folder) / "store")
        recipe = tiny_recipe(
            Path(folder),
            model={
                "num_layers": 2,
                "hidden_size": 1024,
                "ffn_hidden_size": 2816,
                "num_heads": 16,
                "num_kv_heads": 16,
            },
            training={"steps": 1000},
        )
        (figures,) = run_distributed(measure, 1, recipe)
    print(json.dumps({"benchmark": "checkpoint", **figures}))


if __name__ == "__main__":
    main()
