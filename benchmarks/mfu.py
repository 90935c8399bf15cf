"""Model FLOPs utilization (MFU) of training on one device, without Ray.

    python benchmarks/mfu.py [--models 1b 3b] [--lengths 2048 8192] [--arms prefix causal fp8]
        [--attention auto|sdpa|flex|te] [--peak-tflops 989] [--trace FILE]

Llama-shaped models of 1B and 3B parameters with random weights (Llama 3.2's sizes), rows of 2,048 and 8,192 of the
`ul2r` mixture, bf16. On a CPU a tiny model takes the same path; its figures are meaningless. Prints one JSON line with
these figures by model and row length; MFU, tokens and memory are those of the first arm:

    mfu                  model FLOPs (PaLM, arXiv 2204.02311, appendix B; attention counted by visible pairs) per second
                         divided by the dense bf16 peak; goal: 0.5, PaLM had 0.462
    tokens_per_second    row positions per second
    prefix_penalty       relative loss of MFU against the same examples under causal attention; goal: below 0.05
    prefix_seconds       seconds of a step divided by those under causal attention, which sees fewer pairs
    fp8_speedup          seconds of a step divided by those with fp8 matrix products, if TransformerEngine is installed
    peak_memory_gib      peak of the memory that torch allocated
    left_out             in place of all these, the reason why a model was not run: the device is too small

With --trace one more step of each arm is recorded by torch's profiler into FILE (.json.gz, for Perfetto); of several
models, lengths or arms each into its own, as in FILE-1b-2048-causal.json.gz. A table of the kernels that took longest
is printed to stderr. For each arm, "split" has the fractions of this step's wall time that the device spent on matrix
products, attention, elementwise work, loss, optimizer, copies and communication that nothing hides, and waiting
(`ul2r.train.monitor.step_trace`), and "trace_seconds" this time, of which the recording takes its part. On a CPU the
operators of torch take the place of kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
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
from torch.profiler import ProfilerActivity, profile, record_function

from ul2r.config import Objective, Parallel, Recipe
from ul2r.errors import RecipeError
from ul2r.model.flops import training_flops
from ul2r.model.sizing import check_memory
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.corpus import SyntheticWindows
from ul2r.testing.distributed import take_step
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.step_trace import STEP, StepSplit, label_kernels, read_split
from ul2r.train.step import TrainStep

NUM_WARMUP_STEPS = 3
NUM_STEPS = 7
ON_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batches."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocabulary_size: int
    tokens_per_microbatch: int
    num_microbatches: int


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256, 8192, 8),
    "3b": Shape(28, 3072, 8192, 24, 8, 128_256, 8192, 8),
}
TINY = {"tiny": Shape(2, 64, 128, 4, 2, 2048, 256, 2)}
MODELS = SHAPES if ON_CUDA else TINY
LENGTHS = (2048, 8192) if ON_CUDA else (128, 256)
ARMS: dict[str, Mapping[str, Any]] = {
    "prefix": {},
    "causal": {"objective": {"attention": "causal"}},
    "fp8": {"training": {"precision": "fp8"}},
}
HAS_FP8 = ON_CUDA and find_spec("transformer_engine") is not None


def make_recipe(shape: Shape, length: int, changes: Mapping[str, Any]) -> Recipe:
    """Make a recipe of the shape with rows of `length` and some settings changed."""
    micro_batch_size = shape.tokens_per_microbatch // length
    objective = {"sequence_length": length, **changes.get("objective", {})}
    training = {
        "steps": NUM_WARMUP_STEPS + NUM_STEPS,
        "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size * shape.num_microbatches,
        **changes.get("training", {}),
    }
    return Recipe.model_validate(
        {
            "name": "mfu",
            # Leaves the weights to `draw_weights`.
            "base": "none",
            "storage": tempfile.gettempdir(),
            "data": {
                "num_sentinels": Objective(sequence_length=length).num_sentinels_needed,
                "vocabulary_size": shape.vocabulary_size,
            },
            "model": {
                "num_layers": shape.num_layers,
                "hidden_size": shape.hidden_size,
                "ffn_hidden_size": shape.ffn_hidden_size,
                "num_heads": shape.num_heads,
                "num_kv_heads": shape.num_kv_heads,
                "rope_theta": 500_000,
            },
            "objective": objective,
            "attention": changes["attention"],
            "training": training,
            "validation": {"num_rows": micro_batch_size},
            "launch": {"gpus_per_worker": int(ON_CUDA), "device_memory_gib": get_free_memory_gib()},
        }
    )


def get_free_memory_gib() -> float | None:
    """Return the free memory of the device, None on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if ON_CUDA else None


def make_batch(recipe: Recipe, step: int) -> Batch:
    """Build a step's rows of random text."""
    size = recipe.data.vocabulary_size
    first_word = 4 + recipe.data.num_sentinels  # after eos, three modes and the sentinels
    modes = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    draw = np.random.default_rng(step)
    num_rows = recipe.training.global_batch_size
    return build_batch(
        range(step * num_rows, (step + 1) * num_rows),
        objective=recipe.objective,
        vocabulary=Vocabulary(size, 0, modes, tuple(range(4, first_word))),
        seed=recipe.seed,
        text_windows=SyntheticWindows(lambda _, length: draw.integers(first_word, size, length)),
    )


@torch.no_grad()
def draw_weights(train_step: TrainStep) -> None:
    """Draw weights on the device; drawn on the CPU, as those of a run are, they would keep it waiting for minutes."""
    for chunk in train_step.chunks:
        for weight in chunk.parameters():
            # Norms have one axis.
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    train_step.optimizer.reload_model_params()


def record_step(train_step: TrainStep, step: int, batch: Batch, file: Path) -> StepSplit:
    """Take a step, write its trace, print a table of it, and return where its time went."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_CUDA else [])]
    with (
        label_kernels(train_step),
        profile(activities=activities) as recording,
        record_function(STEP),
    ):
        take_step(train_step, step, batch)
        if ON_CUDA:
            # The optimizer step is still running.
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    recording.export_chrome_trace(str(file))
    split = read_split(file)
    print(f"{file}\n{split.format_table()}\n", file=sys.stderr, flush=True)
    return split


def train(recipe: Recipe, mesh: Mesh, peak: float, trace: Path | None) -> dict[str, Any]:
    """Train and return the seconds of a step and what follows from them; write the trace of one if asked to."""
    train_step = TrainStep(recipe, mesh, recipe.data.vocabulary_size)
    draw_weights(train_step)
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()

    seconds = []
    flops = []
    for step in range(NUM_WARMUP_STEPS + NUM_STEPS):
        batch = make_batch(recipe, step)
        start = time.perf_counter()
        # The host knows the losses only when the device has finished, so no further wait is needed.
        losses = take_step(train_step, step, batch).losses
        seconds.append(time.perf_counter() - start)
        flops.append(
            training_flops(
                recipe.model,
                recipe.data.vocabulary_size,
                losses.positions,
                losses.num_visible_keys,
                float(losses.targets.sum()),
            )
        )
        assert np.isfinite(losses.mean)

    traced: dict[str, Any] = {}
    if trace is not None:
        number = NUM_WARMUP_STEPS + NUM_STEPS
        split = record_step(train_step, number, make_batch(recipe, number), trace)
        traced = {"split": split.fractions(), "trace_seconds": split.wall_seconds}

    # Frees the model before the next one is built.
    del train_step
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()
    step_seconds = statistics.median(seconds[NUM_WARMUP_STEPS:])
    return {
        "mfu": statistics.median(flops[NUM_WARMUP_STEPS:]) / step_seconds / (peak * 1e12),
        "tokens_per_second": losses.positions / step_seconds,
        "step_seconds": step_seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_CUDA else 0.0,
        **traced,
    }


def name_trace(options: argparse.Namespace, name: str, length: int, arm: str) -> Path | None:
    """Return the file for the trace of an arm, None if there shall be none."""
    file: Path | None = options.trace
    if file is None or len(options.models) * len(options.lengths) * len(options.arms) == 1:
        return file
    stem = file.name.removesuffix(".gz").removesuffix(".json")
    return file.with_name(f"{stem}-{name}-{length}-{arm}.json.gz")


def measure(name: str, length: int, mesh: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the arms of one model at one row length, and compare them."""
    shape = MODELS[name]
    try:
        check_memory(
            make_recipe(shape, length, {"attention": options.attention}), shape.vocabulary_size
        )
    except RecipeError as error:
        return {"left_out": str(error)}
    results = {
        arm: train(
            make_recipe(shape, length, {"attention": options.attention, **ARMS[arm]}),
            mesh,
            options.peak_tflops,
            name_trace(options, name, length, arm),
        )
        for arm in options.arms
    }
    first = results[options.arms[0]]
    figures: dict[str, Any] = {
        key: first[key] for key in ("mfu", "tokens_per_second", "peak_memory_gib")
    }
    if {"prefix", "causal"} <= results.keys():
        prefix, causal = results["prefix"], results["causal"]
        figures["prefix_penalty"] = 1 - prefix["mfu"] / causal["mfu"]
        figures["prefix_seconds"] = prefix["step_seconds"] / causal["step_seconds"]
    if {"prefix", "fp8"} <= results.keys():
        figures["fp8_speedup"] = results["prefix"]["step_seconds"] / results["fp8"]["step_seconds"]
    for key in ("split", "trace_seconds"):
        if key in first:
            figures[key] = {arm: result[key] for arm, result in results.items()}
    return figures


def round_numbers(value: Any) -> Any:  # noqa: ANN401  any tree
    """Return a tree whose numbers have four digits."""
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Model FLOPs utilization of training.")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bf16 peak (H100, H200: 989)"
    )
    parser.add_argument("--attention", default="auto", help="attention backend")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="row lengths")
    arms = [arm for arm in ARMS if arm != "fp8" or HAS_FP8]
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--trace", type=Path, help="file for the trace of a step (.json.gz)")
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
        for name in arguments.models:
            for length in arguments.lengths:
                mesh = Mesh.join(Parallel())
                figures[f"{name}/{length}"] = round_numbers(measure(name, length, mesh, arguments))
                mesh.leave()
        dist.destroy_process_group()
    device = torch.cuda.get_device_name() if ON_CUDA else "cpu"
    print(json.dumps({"benchmark": "mfu", "device": device, "peak_tflops": peak, **figures}))


if __name__ == "__main__":
    main()
