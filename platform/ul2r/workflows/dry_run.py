"""A run checked and sized without being started: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ul2r.config import Recipe
from ul2r.data.store.dataset import open_dataset
from ul2r.launch.preflight import check_run, planned_vocabulary
from ul2r.model.flops import num_active_parameters, num_visible_keys, training_flops
from ul2r.model.sizing import GIB, RunEstimate, estimate_run, estimate_seconds, pad_vocabulary
from ul2r.objective import Vocabulary, build_batch

SAMPLED_ROWS = 256
"""Rows made to see how many keys attention lets through."""


def dry_run(recipe: Recipe) -> str:
    """Check a run as `train` does, as far as that needs no service, and describe what it needs.

    A store that is not prepared yet is no mistake: the run is then sized by the recipe's own vocabulary.

    Returns:
        Lines for people.

    Raises:
        UserError: If a check fails.
    """
    if recipe.storage_paths.store.exists():
        dataset = open_dataset(recipe.storage_paths.store)
        reached = check_run(recipe, dataset)
        size, origin = dataset.vocabulary.size, "of the token store"
        start = f"step {reached.step:,}" if reached else _start(recipe)
        checked = "recipe, token store, checkpoints, memory"
    else:
        size = planned_vocabulary(recipe)
        tokenizer = recipe.data.tokenizer
        origin = f"of {tokenizer}" if tokenizer else "as data.vocabulary_size says"
        start = _start(recipe)
        checked = f"recipe and memory only: {recipe.storage_paths.store} is not prepared yet"
    sizing = estimate_run(recipe, size)
    facts = [
        ("checked", checked),
        ("starts from", start),
        (
            "vocabulary",
            f"{size:,} {origin}, embedding padded to {pad_vocabulary(recipe.model.num_used_embeddings(size)):,}",
        ),
        *_facts(recipe, sizing, size),
    ]
    lines = [
        f"{recipe.name}: dry run, nothing was started",
        "",
        *_aligned(facts, "<<"),
        "",
        f"Memory of one worker in GiB, by pipeline stage; {_device(recipe)}:",
        "",
        *_aligned([*_stages(sizing)], "<" + ">" * 9),
        "",
        "Left out: the device's own context, communication buffers, fragmentation, temporary tensors.",
    ]
    if recipe.attention_backend == "sdpa":
        lines += [
            "And attention scores, which grow with the square of the row, should torch not take a fused kernel.",
        ]
    return "\n".join(lines)


def seen_keys_per_row(recipe: Recipe) -> float:
    """Keys that the queries of a row see, as `training_flops` wants them; the mean of the run's first rows.

    Their text is left blank: lengths and spans do not depend on it. Where examples keep within their documents it
    is the most they can see.
    """
    rows = build_batch(
        range(min(SAMPLED_ROWS, recipe.training.steps * recipe.training.global_batch_size)),
        objective=recipe.objective,
        vocabulary=_stand_in(recipe.num_sentinels_needed),
        seed=recipe.seed,
        text_windows=_BlankWindows(),
    )
    return num_visible_keys(recipe.model, rows.kv_start, rows.kv_end) / len(rows)


class _BlankWindows:
    """Windows of whatever length is asked for, all of one token."""

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],  # noqa: ARG002  none is too long
        windows: npt.NDArray[np.int32],
    ) -> None:
        windows[: len(samples)] = 0


def _stand_in(sentinels: int) -> Vocabulary:
    modes = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    return Vocabulary(4 + sentinels, 0, modes, tuple(range(4, 4 + sentinels)))


def _start(recipe: Recipe) -> str:
    return f"weights of {recipe.base}" if recipe.base else "initial weights"


def _facts(recipe: Recipe, sizing: RunEstimate, vocabulary_size: int) -> Iterator[tuple[str, str]]:
    parallel, training = recipe.parallel, recipe.training
    step_rows, length = training.global_batch_size, recipe.objective.sequence_length
    rows = training.steps * step_rows
    flops = training_flops(
        recipe.model, vocabulary_size, rows * length, rows * seen_keys_per_row(recipe)
    )
    yield "parameters", f"{_short(sizing.num_parameters)} ({sizing.num_parameters:,})"
    if recipe.model.num_experts is not None:
        active = num_active_parameters(recipe.model, vocabulary_size)
        yield "active parameters", f"{_short(active)} ({active:,}) for each token"
    yield (
        "workers",
        f"{parallel.num_workers} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}",
    )
    yield "chunks of layers", f"{parallel.virtual_stages} on each pipeline rank"
    yield "sequence parallel", "yes" if parallel.sequence_parallel else "no"
    yield "precision", recipe.precision
    yield "recomputation", training.recompute
    yield (
        "microbatches",
        f"{recipe.num_microbatches} a step and replica, of {training.micro_batch_size} x {length:,} positions",
    )
    yield "pipeline bubble", f"{sizing.bubble:.1%} of a step"
    yield (
        "positions",
        f"{_short(step_rows * length)} a step, {_short(rows * length)} in {training.steps:,} steps",
    )
    yield "warm-up", f"{recipe.warmup_steps:,} steps"
    yield "training FLOPs", f"{flops:.3g}"
    yield "expected time", _time(recipe, estimate_seconds(recipe, flops))


def _time(recipe: Recipe, seconds: float | None) -> str:
    launch = recipe.launch
    if seconds is None:
        return "not known on CPUs; set launch.device_peak_tflops"
    hours = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return (
        f"{hours} at {launch.assumed_mfu:.0%} of {launch.peak_tflops:g} TFLOP/s on each worker "
        "(launch.assumed_mfu, launch.device_peak_tflops)"
    )


def _device(recipe: Recipe) -> str:
    memory = recipe.launch.memory_gib
    if memory is None:
        return "no limit on CPUs without launch.device_memory_gib"
    return f"its device has {memory:g} (launch.device_memory_gib)"


def _stages(sizing: RunEstimate) -> Iterator[tuple[str, ...]]:
    """A heading, then a line for each stage."""
    kinds = tuple(sizing.stages[0].memory.by_kind)
    yield ("stage", "layers", "parameters", "microbatches kept", *kinds, "total")
    for number, stage in enumerate(sizing.stages):
        sizes = (*stage.memory.by_kind.values(), stage.memory.total)
        yield (
            str(number),
            str(stage.layers),
            f"{stage.num_parameters:,}",
            f"{stage.microbatches:g}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )


def _aligned(lines: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Columns as wide as their widest entry, each set to its side, "<" or ">"."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def _short(number: float) -> str:
    """Three digits and a unit: 8.03 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:,.{max(3 - len(str(int(scaled))), 0)}f} {unit}"
    return f"{number:g}"
