"""Rate and memory of import and export, beside safetensors alone on the same files.

    python benchmarks/convert.py

A random Llama of 155 million fp32 parameters in several files. One JSON line:

    import_megabytes_per_second   weights read into one rank's model
    import_ratio                  share of the rate at which safetensors alone copies the same files into memory
    export_megabytes_per_second   weights of a distributed checkpoint written as files
    export_ratio                  share of the rate at which safetensors alone reads those files
    export_write_ratio            share of the rate at which safetensors alone writes them
    peak_bytes_over_shard         most memory taken while a rank of TP 2 builds its model and imports, over its shard
    allowed_bytes_over_shard      the same for the shard and the largest tensor, which is the limit

Files are in the page cache. The parts of a ratio take turns in one process; each rate is the median of its turns.
Memory is what the process has of its own (RssAnon); pages of files that it maps are the system's to take back.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ul2r.config import Architecture, Causal, HuggingFace, Objective, Parallel, Recipe
from ul2r.config.recipe import Training
from ul2r.model.huggingface.exporting import _write_weights, exported_tensors
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import tensor_shapes
from ul2r.model.huggingface.source import Source
from ul2r.model.huggingface.stored import Stored
from ul2r.testing.distributed import run_distributed

ROWS, TURNS, SHARD = 32_768, 5, 128 * 2**20
MODEL = Architecture(
    layers=8,
    hidden_size=1024,
    ffn_hidden_size=3072,
    heads=16,
    kv_heads=4,
    embedding_rows=ROWS,
    tied=False,
)


def write_source(folder: Path) -> None:
    """Random weights as a Hugging Face folder has them."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, ROWS)
    _write_weights(folder, ((name, torch.randn(shape)) for name, shape in shapes.items()), SHARD)


def read_alone(folder: Path, place: dict[str, torch.Tensor]) -> None:
    """What safetensors alone takes to copy every tensor into memory that is there."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  no mapping
                place[name].copy_(stored.get_tensor(name))


def write_alone(folder: Path, files: Iterable[dict[str, torch.Tensor]]) -> None:
    """What safetensors alone takes to write as many tensors, that are in memory, to as many files."""
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"alone-{number}")


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
        base=HuggingFace(hf=str(folder)),
        model=MODEL,
        objective=Objective(mixture=(Causal(),), sequence_length=64),
        parallel=parallel,
        training=Training(steps=1, global_batch_rows=1),
    )


def peak(folder: Path) -> tuple[int, int]:
    """Bytes that this rank took to build and to import, and those of its shard."""
    from ul2r.model.build import build_model, shards
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.train.mesh import Mesh

    recipe = recipe_of(folder, Parallel(workers=2, tensor=2))
    Mesh.join(recipe.parallel)
    with watched_memory() as most:
        (model,) = build_model(recipe, ROWS)
        with Source(folder, MODEL) as source:
            load_weights(model, source, MODEL)
    return most[0], sum(shard.data.nbytes for shard in shards(model))


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
    names = [json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))][0][
        "weight_map"
    ]
    files = [
        {name: place[name] for name, file in names.items() if file == one}
        for one in sorted(set(names.values()))
    ]
    out = folder.parent / "export"
    out.mkdir()

    def read() -> None:
        with Source(folder, MODEL) as source:
            load_weights(model, source, MODEL)

    def write() -> None:
        tensors = exported_tensors(Stored(folder.parent / "checkpoint"), MODEL, ROWS)
        _write_weights(out, tensors, SHARD)

    read()
    save_weights([model], folder.parent / "checkpoint")
    taken: dict[str, list[float]] = {"import": [], "read": [], "export": [], "write": []}
    for _ in range(TURNS):
        taken["import"].append(seconds(read))
        taken["read"].append(seconds(lambda: read_alone(folder, place)))
        taken["export"].append(seconds(write))
        taken["write"].append(seconds(lambda: write_alone(out, files)))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_source(folder)
        shapes = tensor_shapes(FAMILIES[MODEL.family], MODEL, ROWS).values()
        total, largest = 4 * sum(map(prod, shapes)), 4 * max(map(prod, shapes))
        (took,) = run_distributed(rates, 1, folder)
        taken, shard = max(run_distributed(peak, 2, folder))
    figures: dict[str, Any] = {
        "import_megabytes_per_second": round(total / took["import"] / 1e6),
        "import_ratio": round(took["read"] / took["import"], 3),
        "export_megabytes_per_second": round(total / took["export"] / 1e6),
        "export_ratio": round(took["read"] / took["export"], 3),
        "export_write_ratio": round(took["write"] / took["export"], 3),
        "peak_bytes_over_shard": round(taken / shard, 3),
        "allowed_bytes_over_shard": round((shard + largest) / shard, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
