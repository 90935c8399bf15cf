"""Share of a GPU's peak that training reaches (MFU), on one device and without Ray.

    python benchmarks/mfu.py [--attention auto|sdpa|flex|te] [--peak-tflops 989]

Llama-shaped models of 1B and 3B parameters with random weights (Llama 3.2's sizes), rows of 2,048 and 8,192 of the
`ul2r` mixture, bf16. On a CPU a tiny model takes the same path; its figures mean nothing. One JSON line, with the
figures by model and row length:

    mfu                  model FLOPs (PaLM, arXiv 2204.02311, appendix B; attention by the pairs in sight) a second over
                         the dense bf16 peak; 0.5 is wanted, PaLM had 0.462
    tokens_per_second    row positions
    prefix_penalty       share of the MFU that the same examples under causal attention have more; under 0.05 is wanted
    prefix_seconds       time for a step over causal attention's, which sees fewer pairs
    fp8_speedup          time for a step over that with matrix products in fp8, where TransformerEngine is installed
    peak_memory_gib      most memory that torch had allocated
    left_out             instead of these, why a model was not tried: the device is too small
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ul2r.config import Objective, Parallel, Recipe
from ul2r.errors import RecipeError
from ul2r.model.flops import training_flops
from ul2r.model.sizing import check_memory
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.corpus import SyntheticWindows
from ul2r.testing.distributed import take_step
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep

WARM_UP, STEPS = 3, 7
ON_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Shape:
    """A model and how much of it is trained at a time."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    num_kv_heads: int
    vocabulary: int
    microbatch_tokens: int
    microbatches: int


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256, 8192, 8),
    "3b": Shape(28, 3072, 8192, 24, 8, 128_256, 8192, 8),
}
TINY = {"tiny": Shape(2, 64, 128, 4, 2, 2048, 256, 2)}
LENGTHS = (2048, 8192) if ON_CUDA else (128, 256)


def recipe_of(shape: Shape, length: int, changes: Mapping[str, Any]) -> Recipe:
    """A run of the shape on rows of `length`, with settings laid over it."""
    rows = shape.microbatch_tokens // length
    objective = {"sequence_length": length, **changes.get("objective", {})}
    training = {
        "steps": WARM_UP + STEPS,
        "micro_batch_size": rows,
        "global_batch_size": rows * shape.microbatches,
        **changes.get("training", {}),
    }
    return Recipe.model_validate(
        {
            "name": "mfu",
            "storage": tempfile.gettempdir(),
            "data": {
                "num_sentinels": Objective(sequence_length=length).num_sentinels_needed,
                "vocabulary_size": shape.vocabulary,
            },
            "model": {
                "num_layers": shape.layers,
                "hidden_size": shape.hidden_size,
                "ffn_hidden_size": shape.ffn_hidden_size,
                "num_heads": shape.heads,
                "num_num_kv_heads": shape.num_kv_heads,
                "rope_theta": 500_000,
            },
            "objective": objective,
            "attention": changes["attention"],
            "training": training,
            "validation": {"num_rows": rows},
            "launch": {"gpus_per_worker": int(ON_CUDA), "device_memory_gib": device_memory_gib()},
        }
    )


def device_memory_gib() -> float | None:
    """What is free on the device; None on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if ON_CUDA else None


def rows_of(recipe: Recipe, step: int) -> Batch:
    """A step's rows of random text."""
    sentinels, size = recipe.data.num_sentinels, recipe.data.vocabulary_size
    draw = np.random.default_rng(step)
    batch = recipe.training.global_batch_size
    return build_batch(
        range(step * batch, (step + 1) * batch),
        objective=recipe.objective,
        vocabulary=Vocabulary(
            size, 0, {"S2S": (1,), "NLU": (2,), "NLG": (3,)}, tuple(range(4, 4 + sentinels))
        ),
        seed=recipe.seed,
        text_windows=SyntheticWindows(lambda _, length: draw.integers(4 + sentinels, size, length)),
    )


def trained(recipe: Recipe, mesh: Mesh, peak: float) -> dict[str, float]:
    """Time of a step, and what follows from it."""
    train_step = TrainStep(recipe, mesh, recipe.data.vocabulary_size)
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds, flops = [], []
    for step in range(WARM_UP + STEPS):
        rows = rows_of(recipe, step)
        began = time.perf_counter()
        losses = take_step(train_step, step, rows).losses  # known to the host: the device is done
        seconds.append(time.perf_counter() - began)
        flops.append(
            training_flops(
                recipe.model, recipe.data.vocabulary_size, losses.positions, losses.num_visible_keys
            )
        )
        assert np.isfinite(losses.mean)
    del train_step
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()
    step_seconds = statistics.median(seconds[WARM_UP:])
    return {
        "mfu": statistics.median(flops[WARM_UP:]) / step_seconds / (peak * 1e12),
        "tokens_per_second": losses.positions / step_seconds,
        "step_seconds": step_seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_CUDA else 0.0,
    }


def measure(
    shape: Shape, length: int, mesh: Mesh, attention: str, peak: float
) -> dict[str, float | str]:
    """Figures of one model at one row length."""
    try:
        check_memory(recipe_of(shape, length, {"attention": attention}), shape.vocabulary)
    except RecipeError as error:
        return {"left_out": str(error)}
    arms: dict[str, Mapping[str, Any]] = {
        "prefix": {},
        "causal": {"objective": {"attention": "causal"}},
    }
    if ON_CUDA and find_spec("transformer_engine"):
        arms["fp8"] = {"training": {"precision": "fp8"}}
    found = {
        arm: trained(recipe_of(shape, length, {"attention": attention, **changes}), mesh, peak)
        for arm, changes in arms.items()
    }
    prefix, causal = found["prefix"], found["causal"]
    figures: dict[str, float | str] = {
        "mfu": prefix["mfu"],
        "tokens_per_second": prefix["tokens_per_second"],
        "prefix_penalty": 1 - prefix["mfu"] / causal["mfu"],
        "prefix_seconds": prefix["step_seconds"] / causal["step_seconds"],
        "peak_memory_gib": prefix["peak_memory_gib"],
    }
    if "fp8" in found:
        figures["fp8_speedup"] = prefix["step_seconds"] / found["fp8"]["step_seconds"]
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Share of a GPU's peak that training reaches.")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bf16 peak (H100, H200: 989)"
    )
    parser.add_argument("--attention", default="auto", help="what computes attention")
    arguments = parser.parse_args()
    peak = arguments.peak_tflops
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if ON_CUDA else "gloo",
            init_method=f"file://{Path(folder) / 'rendezvous'}",
            rank=0,
            world_size=1,
            device_id=torch.device("cuda", 0) if ON_CUDA else None,
        )
        for name, shape in (SHAPES if ON_CUDA else TINY).items():
            for length in LENGTHS:
                mesh = Mesh.join(Parallel())
                found = measure(shape, length, mesh, arguments.attention, peak)
                mesh.leave()
                figures[f"{name}/{length}"] = {
                    key: value if isinstance(value, str) else float(f"{value:.4g}")
                    for key, value in found.items()
                }
        dist.destroy_process_group()
    device = torch.cuda.get_device_name() if ON_CUDA else "cpu"
    print(json.dumps({"benchmark": "mfu", "device": device, "peak_tflops": peak, **figures}))


if __name__ == "__main__":
    main()
