"""Size of a run against published numbers, a simulated pipeline and arithmetic by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ul2r.config import Parallel, Recipe
from ul2r.errors import RecipeError
from ul2r.model.attention import DenseMask, pack_intervals
from ul2r.model.sizing import (
    GIB,
    check_memory,
    count_live_passes,
    estimate_run,
    estimate_seconds,
    pipeline_bubble,
)
from ul2r.testing.recipes import tiny_recipe

LLAMA_3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
}
LLAMA_3_VOCABULARY = 128_256
LLAMA_3_8B_PARAMETERS = 8_030_261_248  # of the published checkpoint, whose embeddings are not tied
ON_GPU = {"gpus_per_worker": 1}


def make_llama(**changes: Any) -> Recipe:  # noqa: ANN401  sections of a recipe
    settings: dict[str, Any] = {
        "model": LLAMA_3_8B,
        "objective": {"sequence_length": 2048},
        "data": {"num_sentinels": 256},
        "training": {"steps": 100, "global_batch_size": 64, "micro_batch_size": 1},
        "validation": {"num_rows": 64},
        "launch": {**ON_GPU, "device_memory_gib": 10_000},
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return tiny_recipe(Path("runs"), **settings)


def test_parameters_equal_the_published_model_without_its_second_embedding() -> None:
    embedding = LLAMA_3_VOCABULARY * 4096
    estimate = estimate_run(make_llama(), LLAMA_3_VOCABULARY)
    assert estimate.num_parameters == LLAMA_3_8B_PARAMETERS - embedding
    assert [stage.num_parameters for stage in estimate.stages] == [estimate.num_parameters]

    two_stages = make_llama(parallel={"num_workers": 2, "pipeline": 2})
    first, last = estimate_run(two_stages, LLAMA_3_VOCABULARY).stages
    assert first.num_parameters + last.num_parameters == LLAMA_3_8B_PARAMETERS


@pytest.mark.parametrize("data", [1, 8])
def test_model_state_has_the_bytes_that_megatron_documents(data: int) -> None:
    """Distributed optimizer, bf16 weights and fp32 gradients: 6 + 12/d bytes a parameter."""
    recipe = make_llama(parallel={"num_workers": data})
    (stage,) = estimate_run(recipe, LLAMA_3_VOCABULARY).stages
    memory = stage.memory
    state = memory.weights + memory.gradients + memory.optimizer
    assert state / stage.num_parameters == pytest.approx(6 + 12 / data, rel=1e-6)


Pass = tuple[str, int, int]
"""Direction, microbatch and chunk."""

GROUP_SIZES = {(3, 4): 4, (4, 10): 5, (4, 11): 6, (7, 12): 12, (20, 32): 32}
"""Group sizes by stages and microbatches where stages do not divide microbatches: the smallest with no group below the
number of stages."""


def schedule_passes(stages: int, stage: int, microbatches: int, chunks: int) -> list[Pass]:
    """Return a stage's passes in order: 1F1B, or interleaved in groups of about as many microbatches as stages."""
    size = GROUP_SIZES.get((stages, microbatches), stages)
    numbers = range(microbatches)
    groups = [numbers[first : first + size] for first in range(0, microbatches, size)]
    forward = [(number, chunk) for group in groups for chunk in range(chunks) for number in group]
    if chunks == 1:
        forward = [(number, 0) for number in numbers]
        warmup = stages - stage - 1
    else:
        warmup = 2 * (stages - stage - 1) + (chunks - 1) * size
    warmup = min(warmup, len(forward))
    backward = [(number, chunks - 1 - chunk) for number, chunk in forward]

    passes: list[Pass] = [("forward", *item) for item in forward[:warmup]]
    for number, item in enumerate(backward):
        if warmup + number < len(forward):
            passes.append(("forward", *forward[warmup + number]))
        passes.append(("backward", *item))
    return passes


def simulate_bubble(stages: int, microbatches: int, chunks: int) -> float:
    """Return the idle fraction if every stage runs each pass of its schedule as soon as its input has arrived."""
    schedules = [schedule_passes(stages, stage, microbatches, chunks) for stage in range(stages)]
    ended: dict[tuple[int, str, int], int] = {}  # by place in the model, direction and microbatch
    clock = [0] * stages
    done = [0] * stages
    passes = 2 * microbatches * chunks

    while len(ended) < stages * passes:
        for stage in range(stages):
            while done[stage] < passes:
                direction, number, chunk = schedules[stage][done[stage]]
                place = chunk * stages + stage
                source = place - 1 if direction == "forward" else place + 1
                waits = 0 <= source < stages * chunks
                if waits and (source, direction, number) not in ended:
                    break
                begin = max(clock[stage], ended[source, direction, number] if waits else 0)
                clock[stage] = begin + (1 if direction == "forward" else 2)
                ended[place, direction, number] = clock[stage]
                done[stage] += 1
    return 1 - 3 * microbatches * chunks / max(clock)


@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"),
    [
        *[(1, 4, 1), (2, 1, 1), (2, 8, 1), (4, 4, 1), (8, 32, 1), (2, 4, 2), (4, 4, 2), (4, 16, 3)],
        *[(3, 4, 2), (4, 10, 2), (4, 11, 2), (20, 32, 6)],
    ],
)
def test_bubble_equals_that_of_a_simulated_schedule(
    stages: int, microbatches: int, chunks: int
) -> None:
    assert pipeline_bubble(stages, microbatches, chunks) == pytest.approx(
        simulate_bubble(stages, microbatches, chunks)
    )


@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"),
    [(4, 8, 1), (4, 8, 2), (4, 4, 3), (3, 4, 2), (4, 10, 2), (4, 11, 2), (20, 32, 6)],
)
def test_live_passes_equal_the_peak_of_the_schedule(
    stages: int, microbatches: int, chunks: int
) -> None:
    parallel = Parallel(num_workers=stages, pipeline=stages, virtual_stages=chunks)
    for stage in range(stages):
        live = 0
        peak = 0
        for direction, _, _ in schedule_passes(stages, stage, microbatches, chunks):
            live += 1 if direction == "forward" else -1
            peak = max(peak, live)
        assert sum(count_live_passes(parallel, microbatches, stage)) == peak


@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"),
    [
        (1, 4, 1),
        (4, 8, 1),
        (4, 8, 2),
        (3, 4, 2),
        (4, 10, 2),
        (4, 11, 3),
        (7, 12, 4),
        (4, 32, 2),
        (8, 64, 5),
    ],
)
def test_intervals_are_prepared_once_in_the_whole_schedule(
    stages: int, microbatches: int, chunks: int
) -> None:
    """Though each microbatch passes through all chunks, and again where activations are recomputed."""
    parallel = Parallel(num_workers=stages, pipeline=stages, virtual_stages=chunks)
    query = torch.randn(4, 1, 2, 8)
    kv_end = np.arange(1, 5, dtype=np.int32)[None].repeat(microbatches, axis=0)
    intervals = torch.split(pack_intervals(0 * kv_end, kv_end), 1)
    for stage in range(stages):
        backend = CountingDenseMask()
        backend.num_kept = parallel.num_live_microbatches(microbatches)
        for _, number, _ in schedule_passes(stages, stage, microbatches, chunks):
            backend(query, query, query, intervals[number], 1.0)
        assert backend.num_masks == microbatches


class CountingDenseMask(DenseMask):
    """Backend that counts the masks that it makes."""

    num_masks = 0

    def prepare(self, *arguments: Any) -> torch.Tensor:  # noqa: ANN401  as there
        self.num_masks += 1
        return super().prepare(*arguments)


def test_early_stages_keep_more_microbatches_but_never_more_than_there_are() -> None:
    def count_live(global_batch_size: int) -> list[float]:
        recipe = make_llama(
            parallel={"num_workers": 4, "pipeline": 4},
            training={"global_batch_size": global_batch_size},
        )
        stages = estimate_run(recipe, LLAMA_3_VOCABULARY).stages
        return [stage.num_live_microbatches for stage in stages]

    assert count_live(64) == [4, 3, 2, 1]
    assert count_live(2) == [2, 2, 2, 1]


def estimate_activations(**changes: Any) -> int:  # noqa: ANN401  sections of a recipe
    stages = estimate_run(make_llama(**changes), LLAMA_3_VOCABULARY).stages
    return max(stage.memory.activations for stage in stages)


def test_recomputed_activations_are_not_kept() -> None:
    by_kind = {
        kind: estimate_activations(training={"recompute": kind})
        for kind in ("none", "selective", "full")
    }
    assert by_kind["none"] > by_kind["selective"] > by_kind["full"]
    # Korthikanti et al. 2022, 5: full recomputation keeps 2 bytes an element of each layer's input. On top come the
    # final norm's 3 and the masks of a byte a pair; a recomputed layer takes less than the logits freed before it.
    assert by_kind["full"] == pytest.approx(2 * (32 + 3) * 2048 * 4096 + 2048**2, rel=0.01)


def test_sequence_parallelism_divides_what_tensor_ranks_had_whole() -> None:
    """Korthikanti et al. 2022, 4.2.2: everything that a layer keeps except its mask is divided by t."""
    selective = {"training": {"recompute": "selective"}}  # keeps no mask in layers
    eight = {"num_workers": 8, "tensor": 8}
    on_one = estimate_activations(parallel={"num_workers": 1}, **selective)
    on_eight = estimate_activations(parallel=eight | {"sequence_parallel": True}, **selective)
    assert on_eight == pytest.approx(on_one / 8, rel=0.05)
    assert estimate_activations(parallel=eight, **selective) > 2 * on_eight


def test_logits_are_on_the_last_stage_in_both_precisions() -> None:
    parallel = {"num_workers": 4, "tensor": 2, "pipeline": 2}
    first, last = estimate_run(make_llama(parallel=parallel), LLAMA_3_VOCABULARY).stages
    assert first.memory.logits == 0
    assert last.memory.logits == 2048 * LLAMA_3_VOCABULARY // 2 * (4 + 2)


@pytest.mark.parametrize(
    ("mixture", "num_targets"),
    [
        ("causal", 2048),
        ("ul2r", 2048),  # S may have a prefix of one token
        # 1,861 raw tokens: 279 masked, 93 sentinels, eos; rounded up to a multiple of 64.
        ("span_corruption", 384),
    ],
)
def test_logits_are_planned_for_the_most_targets_of_the_mixture(
    mixture: str, num_targets: int
) -> None:
    recipe = make_llama(objective={"mixture": mixture, "sequence_length": 2048})
    (stage,) = estimate_run(recipe, LLAMA_3_VOCABULARY).stages
    assert stage.memory.logits == num_targets * LLAMA_3_VOCABULARY * (4 + 2)


def test_validation_has_logits_at_all_positions_and_no_activations() -> None:
    """A vocabulary so large that they take more than what training keeps."""
    size = 2**23
    recipe = make_llama(objective={"mixture": "span_corruption", "sequence_length": 2048})
    (stage,) = estimate_run(recipe, size).stages
    assert stage.memory.activations + stage.memory.logits == pytest.approx(
        2048 * size * (4 + 2), rel=0.01
    )


def test_time_is_flops_over_the_devices_expected_rate() -> None:
    launch = {"device_peak_tflops": 100, "assumed_mfu": 0.5}
    recipe = tiny_recipe(Path("runs"), parallel={"num_workers": 2}, launch=launch)
    assert estimate_seconds(recipe, 1e16) == pytest.approx(100)
    assert estimate_seconds(tiny_recipe(Path("runs")), 1e16) is None


def test_model_state_too_large_for_a_device_is_refused_naming_each_kind() -> None:
    with pytest.raises(RecipeError) as caught:
        check_memory(make_llama(launch={"device_memory_gib": None}), LLAMA_3_VOCABULARY)
    weights = 2 * (LLAMA_3_8B_PARAMETERS - LLAMA_3_VOCABULARY * 4096) / GIB
    assert (
        f"weights {weights:.2f}, gradients {2 * weights:.2f}, optimizer {6 * weights:.2f}"
        in str(caught.value)
    )
    assert str(caught.value).endswith(
        "its device has launch.device_memory_gib=76: raise parallel.tensor, parallel.pipeline or parallel.num_workers"
    )


def test_activations_too_large_for_a_device_are_refused_naming_what_reduces_them() -> None:
    recipe = make_llama(
        parallel={"num_workers": 8, "tensor": 8},
        training={"micro_batch_size": 64},
        launch={"device_memory_gib": 80},
    )
    with pytest.raises(RecipeError) as caught:
        check_memory(recipe, LLAMA_3_VOCABULARY)
    assert str(caught.value).endswith(
        "set training.recompute=full, raise parallel.tensor, or lower training.micro_batch_size=64 or "
        "objective.sequence_length=2048"
    )

    training = recipe.training.model_copy(update={"recompute": "full"})
    check_memory(recipe.model_copy(update={"training": training}), LLAMA_3_VOCABULARY)


def test_memory_may_be_used_to_the_last_byte() -> None:
    total = estimate_run(make_llama(), LLAMA_3_VOCABULARY).stages[0].memory.total
    check_memory(make_llama(launch={"device_memory_gib": total / GIB}), LLAMA_3_VOCABULARY)
    with pytest.raises(RecipeError, match="GiB"):
        check_memory(
            make_llama(launch={"device_memory_gib": (total - 1) / GIB}), LLAMA_3_VOCABULARY
        )


def test_a_cpu_run_is_limited_only_by_the_memory_that_its_recipe_sets() -> None:
    recipe = make_llama(launch={"gpus_per_worker": 0, "device_memory_gib": None})
    check_memory(recipe, LLAMA_3_VOCABULARY)
    assert estimate_run(recipe, LLAMA_3_VOCABULARY).stages[0].memory.total > 100 * GIB
    with pytest.raises(RecipeError, match="device_memory_gib=16"):
        check_memory(
            make_llama(launch={"gpus_per_worker": 0, "device_memory_gib": 16}), LLAMA_3_VOCABULARY
        )


def test_an_embedding_that_tensor_ranks_cannot_share_is_refused() -> None:
    recipe = tiny_recipe(
        Path("runs"),
        model={"hidden_size": 96, "ffn_hidden_size": 96, "num_heads": 12, "num_kv_heads": 3},
        parallel={"num_workers": 3, "tensor": 3},
    )
    with pytest.raises(RecipeError) as caught:
        estimate_run(recipe, 500)
    assert str(caught.value) == (
        "parallel.tensor=3 does not divide the embedding's 512 rows (500 tokens, padded to 128): "
        "set parallel.tensor to a power of two"
    )
    estimate_run(recipe, 384)


def test_sizing_imports_neither_torch_nor_ray() -> None:
    """Importing it through its package must not load Megatron-Core either."""
    code = "import sys, ul2r.model.sizing; print(*{name.split('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "ray", "mlflow"} & set(found.stdout.split())
