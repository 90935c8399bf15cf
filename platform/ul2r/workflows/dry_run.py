"""A run checked and sized without being started: the text that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ul2r.config import Recipe
from ul2r.data.store.dataset import is_prepared, open_run_dataset
from ul2r.launch.disk_space import find_free_bytes
from ul2r.launch.preflight import (
    check_infilling,
    check_run,
    find_resume_checkpoint,
    plan_run_data,
    planned_vocabulary,
)
from ul2r.model.file_sizes import estimate_files, format_size
from ul2r.model.flops import num_active_parameters, num_visible_keys, training_flops
from ul2r.model.sizing import (
    GIB,
    RunEstimate,
    check_memory,
    estimate_run,
    estimate_seconds,
    pad_vocabulary,
)
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.objective.random_kernels import Runs

SAMPLED_ROWS = 256
"""Rows built to estimate how many keys the queries see."""


def dry_run(recipe: Recipe) -> str:
    """Check a run as `train` does, as far as no service and no other process is needed, and describe what it needs.

    A store that is not prepared yet is not an error: the run is then sized by the recipe's own vocabulary.

    Returns:
        Text to print.

    Raises:
        UserError: If a check fails.
    """
    # With a store the tokenizer is known, and so is the checkpoint that the run would resume from.
    if is_prepared(recipe):
        dataset = open_run_dataset(recipe)
        resumed = find_resume_checkpoint(recipe)
        check_run(recipe, dataset, resumed)
        vocabulary_size = dataset.vocabulary.size
        origin = "of the token store"
        start = f"step {resumed.step:,}" if resumed else _describe_start(recipe)
        order = plan_run_data(recipe, dataset, resumed).description
        checked = "recipe, token store, checkpoints, memory, disk"
    else:
        vocabulary_size = planned_vocabulary(recipe)
        tokenizer = recipe.data.tokenizer
        origin = f"of {tokenizer}" if tokenizer else "from data.vocabulary_size"
        # With a store, `check_run` has done it.
        check_infilling(recipe)
        check_memory(recipe, vocabulary_size)
        start = _describe_start(recipe)
        order = "that of the base" if recipe.data.continue_from_base else "known with the store"
        checked = f"recipe and memory only: {recipe.storage_paths.store} is not prepared yet"

    estimate = estimate_run(recipe, vocabulary_size)
    padded = pad_vocabulary(recipe.model.num_used_embeddings(vocabulary_size))
    facts = [
        ("checked", checked),
        ("starts from", start),
        ("order of the text", order),
        ("vocabulary", f"{vocabulary_size:,} {origin}, embedding padded to {padded:,}"),
        *_model_and_layout(recipe, estimate, vocabulary_size),
        *_length_and_cost(recipe, estimate, vocabulary_size),
        ("disk", _describe_disk(recipe, vocabulary_size)),
    ]

    return "\n".join(_format_report(recipe, facts, estimate))


def seen_keys_per_row(recipe: Recipe) -> float:
    """Return the number of keys that the queries of a row see, as `training_flops` takes it.

    It is the mean over the run's first rows. Their text is left blank, since lengths and spans do not depend on it.
    For examples that stay within their documents, and for pairs, it is an upper bound.
    """
    batch = _sample_rows(recipe)
    return num_visible_keys(recipe.model, batch.kv_start, batch.kv_end) / len(batch)


def targets_per_row(recipe: Recipe) -> float:
    """Return the number of a row's targets, as the mean over the run's first rows."""
    batch = _sample_rows(recipe)
    return float(batch.loss_mask.sum()) / len(batch)


def _sample_rows(recipe: Recipe) -> Batch:
    # The run's own first rows, by its own seed, so that the estimate is the same in every call.
    num_rows = min(SAMPLED_ROWS, recipe.training.steps * recipe.training.global_batch_size)
    return build_blank_batch(recipe, num_rows)


def build_blank_batch(recipe: Recipe, num_rows: int) -> Batch:
    """Build the run's first rows without their text: lengths, spans and intervals do not depend on it.

    Those of pairs do: here each fills its slot alone, with a prompt as long as it can be.
    """
    return build_batch(
        range(num_rows),
        objective=recipe.objective,
        vocabulary=_make_vocabulary(recipe.num_sentinels_needed),
        seed=recipe.seed,
        text_windows=_BlankWindows(),
        pairs=_BlankPairs(),
    )


class _BlankWindows:
    """Text windows of any length, filled with one token."""

    def read(
        self,
        samples: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],  # noqa: ARG002  no length is too long for a blank text
        windows: npt.NDArray[np.int32],
    ) -> None:
        """Fill the first rows of `windows`, one for each sample."""
        windows[: len(samples)] = 0


class _BlankPairs:
    """Pairs that fill a slot each, filled with one token, with an answer of one."""

    max_pairs = 1

    def read(
        self,
        numbers: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        windows: npt.NDArray[np.int32],
        runs: Runs,
    ) -> None:
        """Write the pair of each slot, which is as long as `lengths` allows."""
        is_pair = numbers >= 0
        windows[is_pair] = 0
        runs.num_spans[is_pair] = 1
        runs.kept[is_pair, 0] = lengths[is_pair] - 1
        runs.masked[is_pair, 0] = 1


def _make_vocabulary(num_sentinels: int) -> Vocabulary:
    """Return a vocabulary of nothing but special tokens, for rows whose text does not matter."""
    # Ids: eos 0, three modes, then the sentinels.
    modes = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    return Vocabulary(4 + num_sentinels, 0, modes, tuple(range(4, 4 + num_sentinels)))


def _describe_start(recipe: Recipe) -> str:
    return f"weights of {recipe.base}" if recipe.base else "initial weights"


def _describe_disk(recipe: Recipe, vocabulary_size: int) -> str:
    # Without a store the storage may be that of another machine: its free space is shown, and nothing refused.
    free = format_size(find_free_bytes(recipe.storage))
    return f"{estimate_files(recipe, vocabulary_size).describe()}; {free} free in {recipe.storage}"


def _model_and_layout(
    recipe: Recipe, estimate: RunEstimate, vocabulary_size: int
) -> Iterator[tuple[str, str]]:
    parallel = recipe.parallel

    yield "parameters", f"{_format_count(estimate.num_parameters)} ({estimate.num_parameters:,})"
    if recipe.model.num_experts is not None:
        active = num_active_parameters(recipe.model, vocabulary_size)
        yield "active parameters", f"{_format_count(active)} ({active:,}) for each token"
    yield (
        "workers",
        f"{parallel.num_workers} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}",
    )
    yield "chunks of layers", f"{parallel.virtual_stages} on each pipeline rank"
    yield "sequence parallel", "yes" if parallel.sequence_parallel else "no"
    yield "precision", recipe.precision
    yield "recomputation", recipe.training.recompute


def _length_and_cost(
    recipe: Recipe, estimate: RunEstimate, vocabulary_size: int
) -> Iterator[tuple[str, str]]:
    training = recipe.training
    row_length = recipe.objective.sequence_length
    num_rows = training.steps * training.global_batch_size
    # Attention is counted by the keys that queries see, not by the square of the row's length.
    flops = training_flops(
        recipe.model,
        vocabulary_size,
        num_rows * row_length,
        num_rows * seen_keys_per_row(recipe),
        num_rows * targets_per_row(recipe),
    )

    yield (
        "microbatches",
        f"{recipe.num_microbatches} a step and replica, of {training.micro_batch_size} x {row_length:,} positions",
    )
    yield "pipeline bubble", f"{estimate.bubble_fraction:.1%} of a step"
    yield (
        "positions",
        f"{_format_count(training.global_batch_size * row_length)} a step, "
        f"{_format_count(num_rows * row_length)} in {training.steps:,} steps",
    )
    yield "warm-up", f"{recipe.warmup_steps:,} steps"
    yield "training FLOPs", f"{flops:.3g}"
    yield "expected time", _format_time(recipe, estimate_seconds(recipe, flops))


def _format_report(
    recipe: Recipe, facts: Sequence[tuple[str, str]], estimate: RunEstimate
) -> Iterator[str]:
    yield f"{recipe.name}: dry run, nothing was started"
    yield ""
    yield from _align(facts, "<<")
    yield ""
    yield f"Memory of one worker in GiB, by pipeline stage; {_describe_device(recipe)}:"
    yield ""
    # A character for each column of `_stage_rows`: the stage, then nine numbers.
    yield from _align([*_stage_rows(estimate)], "<" + ">" * 9)
    yield ""
    yield (
        "Not included: the device's own context, communication buffers, fragmentation, temporary tensors."
    )
    # Whether torch finds a fused kernel for a dense mask depends on device and dtype, which are not at hand here.
    if recipe.attention_backend == "sdpa":
        yield (
            "Nor attention scores, which grow with the square of the row length if torch uses no fused kernel."
        )


def _format_time(recipe: Recipe, seconds: float | None) -> str:
    launch = recipe.launch
    if seconds is None:
        return "unknown on CPUs; set launch.device_peak_tflops"

    duration = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return (
        f"{duration} at {launch.assumed_mfu:.0%} of {launch.peak_tflops:g} TFLOP/s on each worker "
        "(launch.assumed_mfu, launch.device_peak_tflops)"
    )


def _describe_device(recipe: Recipe) -> str:
    memory = recipe.launch.memory_gib
    if memory is None:
        return "no limit on CPUs without launch.device_memory_gib"
    return f"its device has {memory:g} (launch.device_memory_gib)"


def _stage_rows(estimate: RunEstimate) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a heading, then of a line for each stage."""
    kinds = tuple(estimate.stages[0].memory.by_kind)
    yield ("stage", "layers", "parameters", "microbatches kept", *kinds, "total")

    for number, stage in enumerate(estimate.stages):
        sizes = (*stage.memory.by_kind.values(), stage.memory.total)
        yield (
            str(number),
            str(stage.num_layers),
            f"{stage.num_parameters:,}",
            f"{stage.num_live_microbatches:g}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )


def _align(lines: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Pad each column to its widest cell, aligned left ("<") or right (">") by its character in `sides`."""
    # zip(*lines) turns lines into columns.
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def _format_count(number: float) -> str:
    """Return three significant digits and a unit: 8.03 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            # 8.03, 80.3, 803: as many decimals as three digits leave.
            scaled = number / size
            return f"{scaled:,.{max(3 - len(str(int(scaled))), 0)}f} {unit}"
    return f"{number:g}"
