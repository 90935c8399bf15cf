"""Settings of UL2R for a model, a text and a machine, each with the reason for it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ul2r.config import Architecture, Data, Objective, Parallel, Recipe
from ul2r.config.parallel import check_tensor_parallel
from ul2r.errors import RecipeError
from ul2r.model.flops import num_parameters
from ul2r.model.sizing import GIB, estimate_run

LONGEST_ROW_ON_GPU = 2048
LONGEST_ROW_ON_CPU = 256
MAX_ROWS_PER_STEP = 128
"""UL2R's own batch for the 8B and 62B models (arXiv 2210.11399, 3.2)."""
MIN_ROWS_PER_STEP = 4
SHORTEST_ROW = 16
"""Tokens; shorter rows have no room for a mode, sentinels and text."""
MIN_HELD_OUT_ROWS = 2
"""Fewer cannot be measured with an error."""
MIN_VALIDATION_ROWS = 8
MAX_INFILL_CONTEXT = 64
"""The default of `evaluation.infill_context_length`."""
MIN_STEPS = 100
"""Batches shrink before a run has fewer updates than this."""
UL2R_FRACTION = 0.001
"""Extra tokens of UL2R by those of pretraining (arXiv 2210.11399: 0.1 % to 1 %)."""
MEMORY_FRACTION = 0.85
"""Part of a device that a run may fill by the estimate, which leaves out communication and fragmentation."""

PEAK_RATES = (
    (125e6, 6e-4),
    (350e6, 3e-4),
    (1.3e9, 2e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (8e9, 1e-4),
)
"""Learning rate by parameters: GPT-3's (arXiv 2005.14165, table 2.1), and UL2R's own from 8B on (arXiv 2210.11399)."""
FINAL_RATE_RATIO = 0.01
"""UL2R's cosine goes from 1e-4 to 1e-6."""

SPECIAL_TOKEN_LR_FACTOR = 5
"""Opening sentinels of SmolLM2-135M after twelve steps: 1.1 nats, instead of 3.9 (benchmarks/new_embeddings.py)."""

PRETRAINING_TOKENS: Mapping[str, float] = {
    "smollm2-135m": 2e12, "smollm2-360m": 4e12, "smollm2-1.7b": 11e12,
    "llama-2": 2e12, "llama-3": 15e12, "llama-3.2": 9e12, "meta-llama-3": 15e12,
    "qwen2.5": 18e12, "qwen3": 36e12, "olmo-2-0425-1b": 4e12, "olmo-2-1124-7b": 4e12, "pythia": 300e9,
    "gemma-3-270m": 6e12, "gemma-3-1b": 2e12, "gemma-3-4b": 4e12, "gemma-3-12b": 12e12, "gemma-3-27b": 14e12,
}  # fmt: skip
"""Tokens that published models were trained on, by the beginning of their names, as their cards say."""


@dataclass(frozen=True)
class Machine:
    """Devices that a run may use.

    Attributes:
        num_gpus: 0 to train on CPUs; of a number that is no power of two, the next smaller one is used.
        memory_gib: Memory of one GPU; not used on CPUs.
        num_cores: CPU cores.
    """

    num_gpus: int
    memory_gib: float
    num_cores: int


class Choice(NamedTuple):
    """A derived setting and why it has its value."""

    value: int | float | str
    reason: str


Settings = Mapping[str, Choice]
"""Derived settings by dotted key of a recipe."""


def find_pretraining_tokens(name: str) -> float | None:
    """Return the tokens that a published model was trained on, None if it is not known.

    Args:
        name: Folder of the model, or its name on the Hub.
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    # The longest beginning first.
    known = sorted(PRETRAINING_TOKENS, key=len, reverse=True)
    return next((PRETRAINING_TOKENS[prefix] for prefix in known if last.startswith(prefix)), None)


def choose_learning_rate(num_weights: int) -> float:
    """Interpolate the peak rate for a model's size, linearly in the logarithms of both; constant beyond the ends."""
    sizes = [size for size, _ in PEAK_RATES]
    right = bisect.bisect_left(sizes, num_weights)
    if right in {0, len(sizes)}:
        return PEAK_RATES[min(right, len(sizes) - 1)][1]
    (small, high), (large, low) = list(pairwise(PEAK_RATES))[right - 1]
    share = math.log(num_weights / small) / math.log(large / small)
    return float(f"{math.exp((1 - share) * math.log(high) + share * math.log(low)):.2g}")


def derive_settings(
    model: Architecture,
    vocabulary_size: int,
    text_tokens: int,
    machine: Machine,
    *,
    pretraining_tokens: float | None = None,
    steps: int | None = None,
) -> Settings:
    """Derive row length, batch, steps, learning rate and layout.

    Args:
        model: The base.
        vocabulary_size: Entries of its tokenizer.
        text_tokens: Tokens of the text, about.
        machine: What trains it.
        pretraining_tokens: Tokens that the base was trained on, if they are known.
        steps: The user's choice of the number of steps, if any.

    Raises:
        RecipeError: If the text is too short, or the model does not fit the machine.
    """
    length = _choose_length(model, machine)
    _check_held_out(text_tokens, length)
    budget, budget_reason = _choose_budget(text_tokens, pretraining_tokens)
    rows = _choose_rows(budget // length)
    if steps is not None:
        rows = max(rows, MIN_ROWS_PER_STEP)
        budget_reason = describe_steps(steps)
    if rows < MIN_ROWS_PER_STEP:
        raise RecipeError(
            f"the text has about {text_tokens:,} tokens, fewer than {MIN_STEPS} steps of {MIN_ROWS_PER_STEP} rows of "
            f"{length}: give more text"
        )
    rows_reason = (
        f"rows of a step: at least {MIN_STEPS} updates{'' if steps is None else ' in one pass over the text'}, at most "
        f"{MAX_ROWS_PER_STEP} rows (arXiv 2210.11399, 3.2)"
    )
    layout = _choose_layout(model, vocabulary_size, length, rows, machine)
    replicas = layout["parallel.num_workers"] // layout["parallel.tensor"]
    rows = max(rows, replicas)
    if steps is None:
        steps = max(budget // (rows * length), 1)

    choices: dict[str, Choice] = {
        **_choose_data(length),
        **{key: Choice(value, _describe_machine(machine)) for key, value in layout.items()},
        **_choose_device(machine),
        "training.global_batch_size": Choice(
            rows,
            rows_reason,
        ),
        "training.steps": Choice(steps, budget_reason),
        "training.new_embeddings": Choice(
            "rare_subwords",
            "first values of new modes and sentinels: learned soonest (docs/models.md)",
        ),
        "validation.num_rows": Choice(
            max(MIN_VALIDATION_ROWS, layout["training.micro_batch_size"] * replicas),
            "whole microbatches",
        ),
        **_choose_rates(num_parameters(model, vocabulary_size)),
    }
    return choices


def describe_steps(steps: int) -> str:
    """Return the reason for a number of steps that the user has chosen."""
    if steps < MIN_STEPS:
        return f"as asked for; fewer than {MIN_STEPS} updates are a trial, and show nothing of UL2R"
    return "as asked for"


def _choose_data(length: int) -> dict[str, Choice]:
    num_sentinels = Objective(sequence_length=length).num_sentinels_needed
    return {
        "objective.sequence_length": Choice(
            length,
            f"at most {LONGEST_ROW_ON_GPU:,} on GPUs and {LONGEST_ROW_ON_CPU} on CPUs, and what the model can read",
        ),
        "evaluation.infill_context_length": Choice(
            min(MAX_INFILL_CONTEXT, length // 4),
            "tokens on each side of a gap, which a row must hold",
        ),
        "data.num_sentinels": Choice(num_sentinels, f"as many as a row of {length} can have spans"),
    }


def _choose_device(machine: Machine) -> dict[str, Choice]:
    if machine.num_gpus:
        return {"launch.gpus_per_worker": Choice(1, "trains on them")}
    return {"launch.cpus_per_worker": Choice(machine.num_cores, "all of its cores")}


def _choose_rates(num_weights: int) -> dict[str, Choice]:
    rate = choose_learning_rate(num_weights)
    return {
        "optimizer.learning_rate": Choice(
            rate,
            f"for {num_weights / 1e6:,.0f} M parameters: GPT-3's rates by size, UL2R's own from 8 B on",
        ),
        "optimizer.final_learning_rate": Choice(
            float(f"{rate * FINAL_RATE_RATIO:.2g}"), "a cosine down to 1 %, as in the paper"
        ),
        "optimizer.special_token_lr_factor": Choice(
            SPECIAL_TOKEN_LR_FACTOR,
            "of modes and sentinels, which start from nothing (docs/models.md)",
        ),
    }


def _choose_length(model: Architecture, machine: Machine) -> int:
    longest = LONGEST_ROW_ON_GPU if machine.num_gpus else LONGEST_ROW_ON_CPU
    readable = model.max_position_embeddings or longest
    if readable < SHORTEST_ROW:
        raise RecipeError(
            f"the model reads at most {readable} tokens (its max_position_embeddings), rows need {SHORTEST_ROW}: give "
            "another model"
        )
    return int(2 ** int(math.log2(min(longest, readable))))


def _check_held_out(text_tokens: int, length: int) -> None:
    """Refuse a text of which too little is held out to measure by."""
    held_out: float = Data.model_fields["held_out_fraction"].default
    if text_tokens * held_out < MIN_HELD_OUT_ROWS * length:
        raise RecipeError(
            f"the text has about {text_tokens:,} tokens, of which {held_out:.2%} are held out to measure by: less than "
            f"{MIN_HELD_OUT_ROWS} rows of {length}: give more text"
        )


def _choose_budget(text_tokens: int, pretraining_tokens: float | None) -> tuple[int, str]:
    """Return the tokens of a run and why."""
    if pretraining_tokens is None:
        return text_tokens, "one pass over the text; what the base was trained on is not known"
    wanted = int(pretraining_tokens * UL2R_FRACTION)
    if wanted <= text_tokens:
        return wanted, (
            f"0.1 % of the {pretraining_tokens:.3g} tokens that the model of this name was trained on (if this is "
            "another: --steps N)"
        )
    share = text_tokens / pretraining_tokens
    return text_tokens, (
        f"one pass over the text, {share:.2g} of the {pretraining_tokens:.3g} tokens that the model of this name was "
        "trained on (if this is another: --steps N); the paper adds 0.001 to 0.01"
    )


def _choose_rows(num_rows: int) -> int:
    """Return the rows of a step, a power of two."""
    most = min(num_rows // MIN_STEPS, MAX_ROWS_PER_STEP)
    return int(2 ** int(math.log2(most))) if most else 0


def _choose_layout(
    model: Architecture, vocabulary_size: int, length: int, rows: int, machine: Machine
) -> dict[str, int]:
    """Return the layout with the fewest tensor ranks, then the largest microbatch, that fits."""
    if not machine.num_gpus:
        return {
            "parallel.num_workers": 1,
            "parallel.tensor": 1,
            "training.micro_batch_size": min(rows, 4),
        }

    for tensor in _powers_of_two(machine.num_gpus):
        workers = _powers_of_two(machine.num_gpus)[-1]
        data = workers // tensor
        try:
            parallel = Parallel(num_workers=workers, tensor=tensor, sequence_parallel=tensor > 1)
            check_tensor_parallel(parallel, model)
        except ValueError:
            continue
        for micro in reversed(_powers_of_two(max(rows // data, 1))):
            recipe = Recipe.model_validate(
                {
                    "name": "layout",
                    "storage": "/",
                    "base": "none",
                    "model": model.model_dump(),
                    "data": {
                        "num_sentinels": Objective(sequence_length=length).num_sentinels_needed,
                        "vocabulary_size": vocabulary_size,
                    },
                    "objective": {"sequence_length": length},
                    "parallel": {
                        "num_workers": workers,
                        "tensor": tensor,
                        "sequence_parallel": tensor > 1,
                    },
                    "training": {
                        "steps": 1,
                        "micro_batch_size": micro,
                        "global_batch_size": micro * data,
                    },
                    "validation": {"num_rows": micro * data},
                    "launch": {"gpus_per_worker": 1},
                }
            )
            needed = max(
                stage.memory.total for stage in estimate_run(recipe, vocabulary_size).stages
            )
            if needed <= MEMORY_FRACTION * machine.memory_gib * GIB:
                return {
                    "parallel.num_workers": workers,
                    "parallel.tensor": tensor,
                    "parallel.sequence_parallel": tensor > 1,
                    "training.micro_batch_size": micro,
                }
    raise RecipeError(
        f"the model does not fit the machine's GPUs, {machine.num_gpus} x {machine.memory_gib:.0f} GiB: write a recipe "
        "with parallel.pipeline or training.recompute, see docs/recipes.md, or use more GPUs"
    )


def _powers_of_two(largest: int) -> list[int]:
    return [2**exponent for exponent in range(int(math.log2(largest)) + 1)]


def _describe_machine(machine: Machine) -> str:
    if not machine.num_gpus:
        return "this machine has no GPU"
    return f"the machine's GPUs: {machine.num_gpus} x {machine.memory_gib:.0f} GiB"
