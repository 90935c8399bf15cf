"""Settings derived from model, text and machine."""

from __future__ import annotations

import math

import pytest

from ul2r.config import Architecture
from ul2r.errors import RecipeError
from ul2r.workflows.derive_settings import (
    Machine,
    Settings,
    choose_learning_rate,
    derive_settings,
    find_pretraining_tokens,
)

SMALL = Architecture(
    num_layers=4, hidden_size=128, ffn_hidden_size=512, num_heads=4, num_kv_heads=4
)
LLAMA_8B = Architecture(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_kv_heads=8,
    max_position_embeddings=8192,
)  # fmt: skip
CPU = Machine(num_gpus=0, memory_gib=0, num_cores=2)


def test_rates_of_published_models_are_their_own() -> None:
    """GPT-3's table 2.1 and UL2R's 3.2."""
    assert choose_learning_rate(125_000_000) == 6e-4
    assert choose_learning_rate(1_300_000_000) == 2e-4
    assert choose_learning_rate(8_000_000_000) == 1e-4


def test_text_of_which_too_little_is_held_out_is_refused_whatever_the_steps() -> None:
    """3 % of 17,000 tokens are two rows of 256, all but two tokens."""
    with pytest.raises(RecipeError, match=r"held out to measure by: less than 2 rows of 256"):
        derive_settings(SMALL, 1000, 17_000, CPU, steps=5)
    derive_settings(SMALL, 1000, 17_100, CPU, steps=5)


def test_a_model_whose_heads_divide_few_layouts_gets_one_of_them() -> None:
    """Phi-4's 40 heads over 10 for keys and values: 4 divides neither of both."""
    model = LLAMA_8B.model_copy(update={"num_heads": 40, "num_kv_heads": 10, "hidden_size": 5120})
    layout = derive_settings(model, 32_000, 10**9, Machine(8, 80, 64), steps=5)
    assert layout["parallel.tensor"].value == 2


def test_a_model_that_reads_hardly_anything_is_refused() -> None:
    model = SMALL.model_copy(update={"max_position_embeddings": 3})
    with pytest.raises(RecipeError, match="reads at most 3 tokens"):
        derive_settings(model, 1000, 10**6, CPU)


def test_rates_fall_with_size_and_stay_within_the_ends() -> None:
    rates = [choose_learning_rate(int(10**exponent)) for exponent in range(5, 13)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (6e-4, 1e-4)
    # Halfway in the logarithm of the size is the geometric mean of the rates.
    middle = choose_learning_rate(round(math.sqrt(125e6 * 350e6)))
    assert middle == pytest.approx(math.sqrt(6e-4 * 3e-4), rel=0.02)


def count_tokens(settings: Settings) -> int:
    """Return the positions that a run with the settings is trained on."""
    keys = "training.steps", "training.global_batch_size", "objective.sequence_length"
    return math.prod(int(settings[key].value) for key in keys)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 2e12),
        ("/models/SmolLM2-135M-Instruct/", 2e12),
        ("Qwen/Qwen2.5-0.5B", 18e12),
        ("meta-llama/Llama-3.2-1B", 9e12),
        ("meta-llama/Llama-3.1-8B", 15e12),
        ("my-llama", None),
    ],
)
def test_pretraining_tokens_go_by_the_beginning_of_the_name(
    name: str, tokens: float | None
) -> None:
    assert find_pretraining_tokens(name) == tokens


def test_steps_are_a_thousandth_of_pretraining_if_the_text_suffices() -> None:
    settings = derive_settings(SMALL, 4096, 10_000_000, CPU, pretraining_tokens=1e9)
    assert count_tokens(settings) == pytest.approx(1e6, rel=0.01)


def test_a_short_text_is_read_once() -> None:
    values = derive_settings(SMALL, 4096, 1_000_000, CPU, pretraining_tokens=2e12)
    assert count_tokens(values) == pytest.approx(1e6, rel=0.01)
    assert "one pass over the text, 5e-07 of" in values["training.steps"].reason


def test_a_text_too_short_for_a_hundred_updates_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"about 50,000 tokens, fewer than 100 steps of 4 rows"):
        derive_settings(SMALL, 4096, 50_000, CPU)


def test_a_model_too_large_for_one_gpu_is_split_over_several() -> None:
    """Weights in bf16 and gradients in fp32 are 48 GB on each replica, whatever the optimizer shards."""
    values = derive_settings(
        LLAMA_8B, 128_256, 10**10, Machine(num_gpus=8, memory_gib=40, num_cores=64)
    )
    assert values["parallel.num_workers"].value == 8
    assert 1 < int(values["parallel.tensor"].value) <= 8
    assert values["parallel.sequence_parallel"].value is True
    assert values["launch.gpus_per_worker"].value == 1
    assert values["objective.sequence_length"].value == 2048


def test_a_model_too_large_for_the_machine_is_refused() -> None:
    with pytest.raises(RecipeError, match="does not fit the machine's GPUs, 1 x 24 GiB"):
        derive_settings(LLAMA_8B, 128_256, 10**10, Machine(num_gpus=1, memory_gib=24, num_cores=8))


@pytest.mark.parametrize(("steps", "is_trial"), [(20, True), (100, False)])
def test_few_steps_are_called_a_trial(steps: int, is_trial: bool) -> None:
    settings = derive_settings(SMALL, 49_152, 10**8, CPU, steps=steps)
    assert ("show nothing" in settings["training.steps"].reason) is is_trial
    assert "in one pass over the text" in settings["training.global_batch_size"].reason
