from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.config.validation_errors import explain

EXPERTS = {"family": "mixtral", "num_experts": 4, "num_experts_per_token": 2}


def recipe(**changes: object) -> Recipe:
    tree: dict[str, Any] = {
        "name": "small",
        "storage": "runs",
        "model": {
            "num_layers": 4,
            "hidden_size": 96,
            "ffn_hidden_size": 96,
            "num_heads": 12,
            "num_kv_heads": 4,
        },
        "training": {"steps": 10, "global_batch_size": 8},
        "objective": {"sequence_length": 256},
    }
    for section, values in changes.items():
        old = tree.get(section)
        if isinstance(old, dict) and isinstance(values, dict):
            tree[section] = old | values
        else:
            tree[section] = values
    return Recipe.model_validate(tree)


def refusal(**changes: object) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    return explain(caught.value, Recipe)


def test_workers_must_be_a_multiple_of_tensor_times_pipeline() -> None:
    assert refusal(parallel={"num_workers": 6, "tensor": 2, "pipeline": 2}) == (
        "parallel: num_workers=6 is not a multiple of tensor x pipeline = 2 x 2 = 4: "
        "set parallel.num_workers to 4, 8, 12, ..."
    )


def test_data_parallel_size_is_workers_over_tensor_times_pipeline() -> None:
    built = recipe(parallel={"num_workers": 8, "tensor": 2, "pipeline": 2})
    assert built.parallel.data == 2
    assert built.num_microbatches == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model": {"num_heads": 5}},
            "model: num_heads=5 does not divide hidden_size=96: change either",
        ),
        (
            {"model": {"num_kv_heads": 5}},
            "model: num_kv_heads=5 does not divide num_heads=12: change either",
        ),
        (
            {"model": {"num_heads": 32, "num_kv_heads": 4}},
            "model: head dimension hidden_size/num_heads=3 is odd",
        ),
        (
            {"model": {"sliding_window_pattern": 2, "sliding_window": 64}},
            "model: sliding_window_pattern=2 with local_rope_theta=None: set both or neither",
        ),
        (
            {"model": {"sliding_window_pattern": 2, "local_rope_theta": 100}},
            "model: sliding_window_pattern=2 needs sliding_window, rotary positions that are not interleaved, and",
        ),
        (
            {"model": {"norm": "layer", "norm_zero_centered": True}},
            "model: norm_zero_centered=true needs norm=rms and is not implemented for qk_norm=full",
        ),
        (
            {"model": {"sliding_window": 64}},
            "objective.sequence_length=256 is more than model.sliding_window=64",
        ),
        (
            {"parallel": {"num_workers": 5, "tensor": 5}},
            "parallel.tensor=5 does not divide model.num_heads=12: set parallel.tensor to one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"parallel": {"num_workers": 12, "tensor": 12}, "model": {"ffn_hidden_size": 100}},
            "parallel.tensor=12 does not divide model.ffn_hidden_size=100",
        ),
        (
            {"parallel": {"num_workers": 3, "tensor": 3}},
            "parallel.tensor=3 neither divides model.num_kv_heads=4 nor is a multiple of it",
        ),
        (
            {"parallel": {"num_workers": 3, "pipeline": 3}},
            "parallel.pipeline x parallel.virtual_stages = 3 x 1 does not divide model.num_layers=4: change either",
        ),
        (
            {"parallel": {"num_workers": 2, "pipeline": 2, "virtual_stages": 4}},
            "parallel.pipeline x parallel.virtual_stages = 2 x 4 does not divide model.num_layers=4: change either",
        ),
        (
            {"parallel": {"virtual_stages": 2}},
            "parallel: virtual_stages=2 interleaves pipeline stages, and pipeline=1: raise parallel.pipeline",
        ),
        (
            {
                "parallel": {
                    "num_workers": 2,
                    "pipeline": 2,
                    "account_for_embedding_and_loss": True,
                },
                "model": {"num_layers": 3},
            },
            "parallel.pipeline x parallel.virtual_stages = 2 x 1 does not divide model.num_layers=3 + 2 "
            "(parallel.account_for_embedding_and_loss): change either",
        ),
        (
            {"parallel": {"account_for_embedding_and_loss": True}},
            "parallel: account_for_embedding_and_loss=true divides layers among pipeline stages, and pipeline=1: raise",
        ),
        (
            {
                "parallel": {"num_workers": 2, "pipeline": 2, "virtual_stages": 2},
                "training": {"global_batch_size": 1},
                "validation": {"num_rows": 8},
            },
            "1 microbatches of training on each replica are fewer than parallel.pipeline=2, which the interleaved "
            "schedule of parallel.virtual_stages=2 needs: raise the rows of training, lower training.micro_batch_size",
        ),
        (
            {
                "parallel": {"num_workers": 4, "pipeline": 2, "virtual_stages": 2},
                "validation": {"num_rows": 2},
            },
            "1 microbatches of validation on each replica are fewer than parallel.pipeline=2",
        ),
        (
            {"parallel": {"sequence_parallel": True}},
            "parallel: sequence_parallel=true splits rows over tensor ranks, and tensor=1: raise parallel.tensor",
        ),
        (
            {"parallel": {"num_workers": 2, "tensor": 2}, "model": EXPERTS},
            "parallel.tensor=2 with model.num_experts=4: Megatron-Core supports experts under tensor "
            "parallelism only with sequence parallelism: set parallel.sequence_parallel to true",
        ),
        (
            {"model": {**EXPERTS, "num_experts_per_token": 5}},
            "model: num_experts_per_token=5 is more than num_experts=4: lower the first",
        ),
        (
            {"model": {"num_experts": 4}},
            "model: num_experts=4 with num_experts_per_token=None: set both or neither",
        ),
        (
            {"model": {"family": "mixtral"}},
            "model: family=mixtral needs experts: set num_experts and num_experts_per_token",
        ),
        (
            {
                "parallel": {"num_workers": 4, "tensor": 4, "sequence_parallel": True},
                "objective": {"sequence_length": 254},
            },
            "parallel.tensor=4 does not divide objective.sequence_length=254, as parallel.sequence_parallel needs",
        ),
        (
            {"parallel": {"num_workers": 2, "context": 2}},
            "parallel: context=2: interval attention, which prefix-LM needs, has no kernel that splits a row over "
            "ranks: set parallel.context to 1",
        ),
        (
            {"training": {"precision": "fp8"}},
            "training.precision=fp8 needs GPUs, launch.gpus_per_worker=0: set the first to auto, bf16 or fp32, or",
        ),
        (
            {
                "training": {"precision": "fp8"},
                "launch": {"gpus_per_worker": 1},
                "model": EXPERTS,
            },
            "training.precision=fp8 with model.num_experts=4: Megatron-Core 0.16 cannot save TransformerEngine's",
        ),
        (
            {
                "training": {"precision": "fp8"},
                "launch": {"gpus_per_worker": 1},
                "model": {"ffn_hidden_size": 100},
            },
            "model.ffn_hidden_size / parallel.tensor = 100 is not a multiple of 16, as training.precision=fp8 needs",
        ),
        (
            {
                "training": {"precision": "fp8"},
                "launch": {"gpus_per_worker": 1},
                "model": {"ffn_hidden_size": 64, "num_heads": 4, "head_size": 16},
                "objective": {"sequence_length": 112},
                "parallel": {"num_workers": 2, "tensor": 2, "sequence_parallel": True},
            },
            "training.micro_batch_size x objective.sequence_length / parallel.tensor = 56 is not a multiple of 16",
        ),
        (
            {"optimizer": {"schedule": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6}},
            "optimizer.warmup_fraction=0.5 and optimizer.decay_fraction=0.6 make 5 + 6 steps, training.steps=10: "
            "lower either fraction",
        ),
        (
            {"optimizer": {"load_optimizer_state": True}},
            "optimizer.load_optimizer_state=true needs a base that is a run of this storage: set base to one, or "
            "optimizer.load_optimizer_state to false",
        ),
        (
            {"parallel": {"num_workers": 2}, "training": {"micro_batch_size": 3}},
            "is not a multiple of training.micro_batch_size x data-parallel size = 3 x 2 = 6",
        ),
        (
            {"objective": {"slots_per_row": 3}},
            "slots_per_row=3 does not divide sequence_length=256",
        ),
        ({"objective": {"sequence_length": 4}}, "objective: 5 tokens are too few for denoiser 'S'"),
        (
            {"objective": {"sequence_length": 4, "mixture": "causal"}},
            "5 tokens are too few for denoiser 'S'",
        ),
        ({"base": "small"}, "base=small is the run's own name: set base to the run to continue"),
        (
            {"optimizer": {"learning_rate": 1e-7}},
            "final_learning_rate=1e-06 is above learning_rate=1e-07",
        ),
        (  # Megatron-Core asserts it of every schedule
            {"optimizer": {"learning_rate": 1e-7, "schedule": "constant"}},
            "final_learning_rate=1e-06 is above learning_rate=1e-07",
        ),
        (
            {"optimizer": {"warmup_fraction": 1}},
            "optimizer.warmup_fraction=1 makes 10 steps of warm-up, training.steps=10: "
            "lower the first or raise the second",
        ),
        (  # round(9.6) steps
            {"optimizer": {"warmup_fraction": 0.96, "schedule": "constant"}},
            "optimizer.warmup_fraction=0.96 makes 10 steps of warm-up, training.steps=10",
        ),
        (
            {"data": {"vocabulary_size": 515}},
            "data: vocabulary_size=515 is too small for 256 bytes, num_sentinels=256, eos and three modes: "
            "raise vocabulary_size to at least 516 or lower num_sentinels",
        ),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(
    changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(**changes)


def test_warm_up_may_last_until_the_last_step() -> None:
    assert recipe(optimizer={"warmup_fraction": 0.94}).warmup_steps == 9
    assert recipe(training={"steps": 1}).warmup_steps == 0


def test_fp8_without_sequence_parallelism_needs_multiples_of_whole_rows() -> None:
    """Each tensor rank then multiplies all 112 positions, not 56 of them."""
    built = recipe(
        training={"precision": "fp8"},
        launch={"gpus_per_worker": 1},
        model={"ffn_hidden_size": 64, "num_heads": 4, "head_size": 16},
        objective={"sequence_length": 112},
        parallel={"num_workers": 2, "tensor": 2},
    )
    assert built.precision == "fp8"


def test_default_precision_depends_on_the_devices() -> None:
    assert recipe().precision == "fp32"
    gpu = {"gpus_per_worker": 1}
    assert recipe(launch=gpu).precision == "bf16"
    assert recipe(launch=gpu, training={"precision": "fp32"}).precision == "fp32"
    assert recipe(launch=gpu, training={"precision": "fp8"}).precision == "fp8"


def test_default_gpu_is_an_h100() -> None:
    assert (recipe().launch.memory_gib, recipe().launch.peak_tflops) == (None, None)
    on_gpu = recipe(launch={"gpus_per_worker": 1}).launch
    assert (on_gpu.memory_gib, on_gpu.peak_tflops) == (76, 989)
    named = {"device_memory_gib": 141, "device_peak_tflops": 312}
    other = recipe(launch={"gpus_per_worker": 1, **named}).launch
    assert (other.memory_gib, other.peak_tflops) == (141, 312)


def test_denoisers_with_the_same_name_are_refused() -> None:
    twice = [{"kind": "prefix", "weight": 1}, {"kind": "prefix", "weight": 2}]
    assert refusal(objective={"mixture": twice}) == (
        "objective.mixture: needs at least one denoiser, and a different name for each; got ['S', 'S']"
    )


@pytest.mark.parametrize(("row", "needed"), [(1024, 128), (2048, 256)])
def test_too_few_sentinels_are_refused_with_the_number_needed(row: int, needed: int) -> None:
    """Other code bases ran out of sentinels here: (3, 0.5) needs one for every eight positions of the row."""
    assert refusal(objective={"sequence_length": row}, data={"num_sentinels": needed - 1}) == (
        f"objective.mixture needs {needed} sentinels in slots of {row} tokens, data.num_sentinels={needed - 1}: "
        f"raise data.num_sentinels to {needed} or shorten the slots"
    )
    recipe(objective={"sequence_length": row}, data={"num_sentinels": needed})


def test_evaluation_needs_sentinels_too() -> None:
    causal = {"sequence_length": 2048, "mixture": "causal"}
    message = refusal(objective=causal, data={"num_sentinels": 255})
    assert message.startswith("evaluation.mixture needs 256 sentinels in slots of 2048 tokens")
    recipe(objective=causal, data={"num_sentinels": 1}, evaluation={"mixture": "causal"})


def test_storage_is_an_absolute_path() -> None:
    built = recipe(storage="runs/demo")
    assert built.storage == Path.cwd() / "runs/demo"
    assert built.storage_paths.run("base").folder == Path.cwd() / "runs/demo/runs/base"


def test_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().seed = 3  # type: ignore[misc]  # the refusal is what is tested


def test_config_imports_nothing_heavy() -> None:
    code = "import sys, ul2r.config; print(*{name.split('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "ray", "mlflow", "megatron", "transformers"} & set(
        found.stdout.split()
    )


def test_default_attention_depends_on_the_device_and_the_head_size() -> None:
    wide = {"hidden_size": 192}
    assert recipe(model=wide).attention_backend == "sdpa"
    assert recipe(model=wide, launch={"gpus_per_worker": 1}).attention_backend == "flex"
    assert recipe(launch={"gpus_per_worker": 1}).attention_backend == "sdpa"  # heads of 8
    chosen = recipe(launch={"gpus_per_worker": 1}, attention="te")
    assert chosen.attention_backend == "te"


@pytest.mark.parametrize("backend", ["flex", "te"])
def test_attention_that_does_not_train_on_a_cpu_is_refused_on_cpus(backend: str) -> None:
    message = refusal(attention=backend)
    assert message.startswith(f"attention={backend} does not train on a CPU")
    assert message.endswith(
        "launch.gpus_per_worker=0: set attention to auto or sdpa, or launch.gpus_per_worker to 1"
    )


def test_sliding_windows_of_some_layers_allow_longer_rows_but_not_transformer_engine() -> None:
    windows = {"sliding_window": 64, "sliding_window_pattern": 3, "local_rope_theta": 100}
    assert recipe(model=windows).model.layer_windows == (64, 64, None, 64)
    assert refusal(model=windows, attention="te", launch={"gpus_per_worker": 1}) == (
        "attention=te does not support sliding windows, and model.sliding_window_pattern=3: "
        "set attention to auto, flex or sdpa"
    )


def test_transformer_engine_attention_needs_bf16() -> None:
    training = {"precision": "fp32"}
    assert refusal(attention="te", training=training, launch={"gpus_per_worker": 1}) == (
        "attention=te has bf16 kernels only, and training.precision=fp32: set attention to auto, flex or sdpa, "
        "or training.precision to bf16"
    )


def test_flex_attention_of_narrow_heads_is_refused() -> None:
    assert refusal(attention="flex", launch={"gpus_per_worker": 1}) == (
        "attention=flex needs heads of at least 16 dimensions, the model's have hidden_size/num_heads=8: "
        "set attention to auto or sdpa, or lower model.num_heads"
    )


@pytest.mark.parametrize(
    ("objective", "causal", "denoising"),
    [
        ({}, False, True),
        ({"attention": "causal"}, True, True),
        ({"mixture": "causal"}, True, False),
        ({"mixture": "fim"}, True, False),
    ],
)
def test_causal_attention_and_denoising_are_independent(
    objective: dict[str, str], causal: bool, denoising: bool
) -> None:
    built = recipe(objective=objective).objective
    assert (built.is_causal, built.is_denoising) == (causal, denoising)
