"""What it takes to save and load a checkpoint, beside a plain write and read of the same bytes.

    python benchmarks/checkpoint.py [FOLDER]

Weights and optimizer state of a model of 26 million parameters, in one process, on the disk of FOLDER (a temporary
one without). What is written is synced to the disk on both sides, what is read was dropped from memory before on
both sides. One JSON line:

    save_ratio                 share of the rate of the plain write, from the loop's call to the switched pointer
    load_ratio                 share of the rate of the plain read, all digests checked
    stall_seconds              how long an asynchronous save keeps the loop from going on
    synchronous_seconds        how long one does that it waits for
    slowdown_seconds           by how much longer the steps take, in all, that are taken while files are written
    step_seconds               one step
    bytes                      size of the checkpoint
    save_bytes_per_second, plain_write_bytes_per_second, load_bytes_per_second, plain_read_bytes_per_second

All of them take turns in one process; each figure is the median of its turns.
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
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

TURNS = 5
CHUNK_BYTES = 2**24


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one turn."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_plainly(folder: Path, contents: list[bytes]) -> None:
    """Write files to the disk itself, all at once."""

    def write(number: int, content: bytes) -> None:
        with (folder / f"plain_{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, range(len(contents)), contents))


def read_plainly(files: list[Path]) -> None:
    """Read files, all at once."""

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass

    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(read, files))


def drop(files: list[Path]) -> None:
    """Forget what memory holds of files."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SavedRun:
    """A run of one process that takes the same step again and again, and saves."""

    def __init__(self, recipe: Recipe) -> None:
        from ul2r.train.checkpoint.checkpointer import Checkpointer
        from ul2r.train.checkpoint.storage import CheckpointStore, acquire_writer_token
        from ul2r.train.mesh import Mesh
        from ul2r.train.step import TrainStep

        self.recipe, self.dataset = recipe, open_dataset(recipe.storage_paths.store)
        mesh = Mesh.join(recipe.parallel)
        self.train_step = TrainStep(recipe, mesh, self.dataset.vocabulary.size)
        self.rows = BatchBuilder(recipe, self.dataset).build(0, 0, 1)
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
            asynchronous=True,
        )

    def step(self) -> None:
        """Train."""
        self.train_step.train(0, self.rows)

    def save(self) -> None:
        """Begin to save."""
        from ul2r.train.checkpoint.metadata import CheckpointInfo

        info = CheckpointInfo.from_recipe(self.recipe, self.dataset, step=len(self.logged) + 1)
        self.checkpointer.save(self.train_step, info)

    def save_and_wait(self) -> None:
        """Save."""
        self.save()
        self.checkpointer.wait()

    def load(self) -> None:
        """Find the last checkpoint that is sound, and load it."""
        from ul2r.train.checkpoint.sharded_state import load_checkpoint

        path = self.checkpointer.latest_valid(self.store)
        assert path is not None
        load_checkpoint(path, self.train_step, optimizer=True)

    def files(self) -> list[Path]:
        """Those of the last checkpoint."""
        return [path for path in self.store.list_checkpoints()[0].iterdir() if path.is_file()]

    def slowdown(self, step_s: float) -> float:
        """Save while steps are taken: by how much longer those take together than `step_s` each."""
        before, slower = len(self.logged), 0.0
        self.save()
        while len(self.logged) == before:
            slower += seconds(self.step) - step_s
            self.checkpointer.poll()
        return slower


def measure(recipe: Recipe) -> dict[str, float]:
    """The figures of the line that is printed, in a process of the run."""
    run = SavedRun(recipe)
    run.step()
    run.save_and_wait()
    turns = []
    for _ in range(TURNS):
        contents = [path.read_bytes() for path in run.files()]
        turn = {
            "write": seconds(partial(write_plainly, run.folder, contents)),
            "save": seconds(run.save_and_wait),
        }
        drop(run.files())
        turn["read"] = seconds(partial(read_plainly, run.files()))
        drop(run.files())
        turn["load"] = seconds(run.load)
        turn["step"] = seconds(run.step)
        turn["slowdown"] = run.slowdown(turn["step"])
        turns.append(turn | {"stall": run.logged[-1]["checkpoint/stall_seconds"]})
    found = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    size = run.logged[-1]["checkpoint/bytes"]
    return {
        "save_ratio": round(found["write"] / found["save"], 3),
        "load_ratio": round(found["read"] / found["load"], 3),
        "stall_seconds": round(found["stall"], 3),
        "synchronous_seconds": round(found["save"], 3),
        "slowdown_seconds": round(found["slowdown"], 3),
        "step_seconds": round(found["step"], 3),
        "bytes": size,
        "save_bytes_per_second": round(size / found["save"]),
        "plain_write_bytes_per_second": round(size / found["write"]),
        "load_bytes_per_second": round(size / found["load"]),
        "plain_read_bytes_per_second": round(size / found["read"]),
    }


def main() -> None:
    """Measure and print."""
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
        (found,) = run_distributed(measure, 1, recipe)
    print(json.dumps({"benchmark": "checkpoint", **found}))


if __name__ == "__main__":
    main()
