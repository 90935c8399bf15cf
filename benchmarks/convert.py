"""Rate and memory of import and export, compared with safetensors alone on the same files.

    python benchmarks/convert.py [FOLDER]

A random Llama of 155 million fp32 parameters in several files, in FOLDER (by default a temporary one). Prints one JSON
line:

    import_megabytes_per_second     weights read into one rank's model
    import_ratio                    fraction of the rate at which safetensors alone copies the same files into memory
    export_megabytes_per_second     weights of a distributed checkpoint written to files
    export_ratio                    fraction of the rate at which safetensors alone reads those files
    export_ratio_limit              the same for a plain write of the same bytes from memory with as many threads
    export_write_ratio              fraction of the rate at which safetensors alone writes them from memory
    peak_bytes_over_shard           peak memory while a rank of TP 2 builds its model and imports, divided by its shard
    allowed_bytes_over_shard        the limit for it: the shard and the largest tensor, divided by the shard
    export_peak_bytes_over_largest  peak memory of an export of TP 2's checkpoint, divided by the largest tensor

Files that are read are in the page cache; those that are written are new and not synced. The parts of a ratio take
turns in one process; each rate is the median of its turns. Memory is the process's private memory (RssAnon): the system
can reclaim pages of mapped files.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ul2r.config import Architecture, Causal, HuggingFaceBase, Objective, Parallel, Recipe
from ul2r.config.training import Training
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader
from ul2r.model.huggingface.exporting import convert_tensors
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import tensor_shapes
from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
from ul2r.model.huggingface.safetensors_writer import NUM_THREADS, StreamedTensor, write_weights
from ul2r.testing.distributed import run_distributed

NUM_EMBEDDINGS = 32_768
NUM_TURNS = 5
SHARD_BYTES = 128 * 2**20
MODEL = Architecture(
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_heads=16,
    num_kv_heads=4,
    num_embeddings=NUM_EMBEDDINGS,
    tie_embeddings=False,
)


def write_source(folder: Path) -> None:
    """Write random weights as a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, NUM_EMBEDDINGS)
    tensors = {name: StreamedTensor.of(torch.randn(shape)) for name, shape in shapes.items()}
    write_weights(folder, tensors, SHARD_BYTES)


def read_with_safetensors(folder: Path, targets: dict[str, torch.Tensor]) -> None:
    """Copy every tensor into allocated memory with safetensors alone."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  not a mapping
                targets[name].copy_(stored.get_tensor(name))


def write_with_safetensors(folder: Path, files: list[dict[str, torch.Tensor]]) -> None:
    """Write the same tensors from memory to as many files with safetensors alone."""
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"safetensors-{number}")


def write_plainly(folder: Path, files: list[dict[str, torch.Tensor]]) -> None:
    """Write the same bytes with plain writes, the limit of the file system."""

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        with (folder / f"plain-{number}").open("wb") as file:
            for tensor in tensors.values():
                file.write(tensor.numpy().data)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(write, range(len(files)), files))


def time_once(work: Callable[[], object]) -> float:
    """Return the seconds of one turn."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def track_peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one number becomes the peak growth of private memory, in bytes, while the block runs."""

    def read_private_bytes() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before = read_private_bytes()
    peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], read_private_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    done.set()
    thread.join()


def make_recipe(folder: Path, parallel: Parallel) -> Recipe:
    """Make a recipe that starts from the model in `folder`."""
    return Recipe(
        name="convert",
        storage=folder.parent,
        base=HuggingFaceBase(hf=str(folder)),
        model=MODEL,
        objective=Objective(mixture=(Causal(),), sequence_length=64),
        parallel=parallel,
        training=Training(steps=1, global_batch_size=1),
    )


def measure_import_memory(folder: Path) -> tuple[int, int]:
    """Return this rank's peak bytes while building and importing, and its shard's; both ranks then save weights."""
    from ul2r.model.build import build_model, iter_shards
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.testing.layouts import save_weights
    from ul2r.train.mesh import Mesh

    recipe = make_recipe(folder, Parallel(num_workers=2, tensor=2))
    Mesh.join(recipe.parallel)
    with track_peak_memory() as peak:
        (model,) = build_model(recipe, NUM_EMBEDDINGS)
        with SafetensorsReader(folder, MODEL.family) as reader:
            load_weights(model, reader, MODEL)
    save_weights([model], folder.parent / "sharded")
    return peak[0], sum(shard.data.nbytes for shard in iter_shards(model))


def export(checkpoint: Path, out: Path) -> None:
    """Export a checkpoint's weights."""
    write_weights(
        out,
        convert_tensors(MegatronCheckpointReader(checkpoint), MODEL, NUM_EMBEDDINGS),
        SHARD_BYTES,
    )


def measure_export_memory(folder: Path) -> int:
    """Return the peak bytes of an export of a checkpoint whose matrices are all sharded."""
    out = folder.parent / "export-of-sharded"
    out.mkdir()
    with track_peak_memory() as peak:
        export(folder.parent / "sharded", out)
    return peak[0]


def measure_seconds(folder: Path) -> dict[str, float]:
    """Return the median seconds of each part."""
    from ul2r.model.build import build_model
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.testing.layouts import save_weights
    from ul2r.train.mesh import Mesh

    recipe = make_recipe(folder, Parallel())
    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, NUM_EMBEDDINGS)
    targets = {
        name: torch.zeros(shape)
        for name, shape in tensor_shapes(FAMILIES[MODEL.family], MODEL, NUM_EMBEDDINGS).items()
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, {})[name] = targets[name]
    shards = list(files.values())
    out = folder.parent / "export"
    checkpoint = folder.parent / "whole"

    def load() -> None:
        with SafetensorsReader(folder, MODEL.family) as reader:
            load_weights(model, reader, MODEL)

    load()
    save_weights([model], checkpoint)
    parts: dict[str, Callable[[], None]] = {
        "import": load,
        "read": lambda: read_with_safetensors(folder, targets),
        "export": lambda: export(checkpoint, out),
        "write": lambda: write_with_safetensors(out, shards),
        "plain": lambda: write_plainly(out, shards),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(NUM_TURNS):
        for name, part in parts.items():
            out.mkdir()
            os.sync()
            seconds[name].append(time_once(part))
            shutil.rmtree(out)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as parent:
        folder = Path(parent) / "model"
        write_source(folder)
        shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, NUM_EMBEDDINGS).values()
        total = 4 * sum(map(prod, shapes))
        largest = 4 * max(map(prod, shapes))
        (seconds,) = run_distributed(measure_seconds, 1, folder)
        import_peak, shard = max(run_distributed(measure_import_memory, 2, folder))
        (export_peak,) = run_distributed(measure_export_memory, 1, folder)

    figures: dict[str, Any] = {
        "import_megabytes_per_second": round(total / seconds["import"] / 1e6),
        "import_ratio": round(seconds["read"] / seconds["import"], 3),
        "export_megabytes_per_second": round(total / seconds["export"] / 1e6),
        "export_ratio": round(seconds["read"] / seconds["export"], 3),
        "export_ratio_limit": round(seconds["read"] / seconds["plain"], 3),
        "export_write_ratio": round(seconds["write"] / seconds["export"], 3),
        "peak_bytes_over_shard": round(import_peak / shard, 3),
        "allowed_bytes_over_shard": round((shard + largest) / shard, 3),
        "export_peak_bytes_over_largest": round(export_peak / largest, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
