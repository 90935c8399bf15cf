"""Rate and memory of import and export, beside safetensors alone on the same files.

    python benchmarks/convert.py [FOLDER]

A random Llama of 155 million fp32 parameters in several files, in FOLDER (a temporary one without). One JSON line:

    import_megabytes_per_second     weights read into one rank's model
    import_ratio                    share of the rate at which safetensors alone copies the same files into memory
    export_megabytes_per_second     weights of a distributed checkpoint written as files
    export_ratio                    share of the rate at which safetensors alone reads those files
    export_ratio_limit              the same for a plain write of the same bytes, from memory, with as many threads
    export_write_ratio              the export's share of the rate at which safetensors alone writes them from memory
    peak_bytes_over_shard           most memory taken while a rank of TP 2 builds its model and imports, over its shard
    allowed_bytes_over_shard        the same for the shard and the largest tensor, which is the limit
    export_peak_bytes_over_largest  most memory taken by an export of TP 2's checkpoint, over the largest tensor

Files that are read are in the page cache, those that are written are new and not synced. The parts of a ratio take
turns in one process; each rate is the median of its turns. Memory is what the process has of its own (RssAnon); pages
of files that it maps are the system's to take back.
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

ROWS, TURNS, SHARD = 32_768, 5, 128 * 2**20
MODEL = Architecture(
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_heads=16,
    num_kv_heads=4,
    num_embeddings=ROWS,
    tie_embeddings=False,
)


def write_source(folder: Path) -> None:
    """Random weights as a Hugging Face folder has them."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, ROWS)
    tensors = {name: StreamedTensor.of(torch.randn(shape)) for name, shape in shapes.items()}
    write_weights(folder, tensors, SHARD)


def read_alone(folder: Path, place: dict[str, torch.Tensor]) -> None:
    """What safetensors alone takes to copy every tensor into memory that is there."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  no mapping
                place[name].copy_(stored.get_tensor(name))


def write_alone(folder: Path, files: list[dict[str, torch.Tensor]]) -> None:
    """What safetensors alone takes to write as many tensors, that are in memory, to as many files."""
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"alone-{number}")


def write_plainly(folder: Path, files: list[dict[str, torch.Tensor]]) -> None:
    """What the file system alone takes to do so."""

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        with (folder / f"plain-{number}").open("wb") as file:
            for tensor in tensors.values():
                file.write(tensor.numpy().data)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(write, range(len(files)), files))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one turn."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The most bytes of its own that the process has, above what it had, while the block runs."""

    def own() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before, most, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], own() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    done.set()
    thread.join()


def recipe_of(folder: Path, parallel: Parallel) -> Recipe:
    """A run that begins with the model in `folder`."""
    return Recipe(
        name="convert",
        storage=folder.parent,
        base=HuggingFaceBase(hf=str(folder)),
        model=MODEL,
        objective=Objective(mixture=(Causal(),), sequence_length=64),
        parallel=parallel,
        training=Training(steps=1, global_batch_size=1),
    )


def import_peak(folder: Path) -> tuple[int, int]:
    """Bytes that this rank took to build and to import, and those of its shard; both ranks' weights are then saved."""
    from ul2r.model.build import build_model, iter_shards
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.testing.layouts import save_weights
    from ul2r.train.mesh import Mesh

    recipe = recipe_of(folder, Parallel(num_workers=2, tensor=2))
    Mesh.join(recipe.parallel)
    with watched_memory() as most:
        (model,) = build_model(recipe, ROWS)
        with SafetensorsReader(folder, MODEL) as source:
            load_weights(model, source, MODEL)
    save_weights([model], folder.parent / "cut")
    return most[0], sum(shard.data.nbytes for shard in iter_shards(model))


def export(checkpoint: Path, out: Path) -> None:
    """What is measured."""
    write_weights(out, convert_tensors(MegatronCheckpointReader(checkpoint), MODEL, ROWS), SHARD)


def export_peak(folder: Path) -> int:
    """Bytes that an export takes, of a checkpoint of which no matrix is whole."""
    out = folder.parent / "export of cut"
    out.mkdir()
    with watched_memory() as most:
        export(folder.parent / "cut", out)
    return most[0]


def rates(folder: Path) -> dict[str, float]:
    """Medians of the turns, in seconds."""
    from ul2r.model.build import build_model
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.testing.layouts import save_weights
    from ul2r.train.mesh import Mesh

    recipe = recipe_of(folder, Parallel())
    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, ROWS)
    place = {
        name: torch.zeros(shape)
        for name, shape in tensor_shapes(FAMILIES[MODEL.family], MODEL, ROWS).items()
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, {})[name] = place[name]
    shards = list(files.values())
    out, checkpoint = folder.parent / "export", folder.parent / "whole"

    def read() -> None:
        with SafetensorsReader(folder, MODEL) as source:
            load_weights(model, source, MODEL)

    read()
    save_weights([model], checkpoint)
    parts: dict[str, Callable[[], None]] = {
        "import": read,
        "read": lambda: read_alone(folder, place),
        "export": lambda: export(checkpoint, out),
        "write": lambda: write_alone(out, shards),
        "plain": lambda: write_plainly(out, shards),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(TURNS):
        for name, part in parts.items():
            out.mkdir()
            os.sync()
            taken[name].append(seconds(part))
            shutil.rmtree(out)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as place:
        folder = Path(place) / "model"
        write_source(folder)
        shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, ROWS).values()
        total, largest = 4 * sum(map(prod, shapes)), 4 * max(map(prod, shapes))
        (took,) = run_distributed(rates, 1, folder)
        taken, shard = max(run_distributed(import_peak, 2, folder))
        (exporting,) = run_distributed(export_peak, 1, folder)
    figures: dict[str, Any] = {
        "import_megabytes_per_second": round(total / took["import"] / 1e6),
        "import_ratio": round(took["read"] / took["import"], 3),
        "export_megabytes_per_second": round(total / took["export"] / 1e6),
        "export_ratio": round(took["read"] / took["export"], 3),
        "export_ratio_limit": round(took["read"] / took["plain"], 3),
        "export_write_ratio": round(took["write"] / took["export"], 3),
        "peak_bytes_over_shard": round(taken / shard, 3),
        "allowed_bytes_over_shard": round((shard + largest) / shard, 3),
        "export_peak_bytes_over_largest": round(exporting / largest, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
