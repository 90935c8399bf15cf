"""Conversion between config.json and architectures; whatever is unsupported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Architecture
from ul2r.config.architecture import RopeScaling
from ul2r.errors import CheckpointError, RecipeError
from ul2r.model.huggingface.config_json import (
    check_family,
    make_config,
    parse_architecture,
    read_architecture,
)
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
"""Sizes and keys that Gemma 3 1B was published with, before transformers 5 nested rotary parameters."""


def write_gemma_config(folder: Path, **changes: Any) -> Path:  # noqa: ANN401  any JSON value
    (folder / "config.json").write_text(json.dumps(GEMMA_3_1B | changes))
    return folder


def test_the_published_keys_of_gemma_3_are_read(tmp_path: Path) -> None:
    found = read_architecture(write_gemma_config(tmp_path))
    assert found.layer_windows == (*4 * (*5 * (512,), None), 512, 512)
    assert (found.rope_theta, found.local_rope_theta) == (1_000_000, 10_000)
    scaled = write_gemma_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert read_architecture(scaled).rope_scaling == RopeScaling(kind="linear", factor=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: only None"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: only None"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true: only False"),
        ({"attention_bias": True}, "attention_bias=true: only False"),
        (
            {"layer_types": ["full_attention", *25 * ["sliding_attention"]]},
            "layer_types=.*only sliding_attention with full_attention in every n-th layer",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_parameters=.*sliding_attention may only set rope_theta",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "partial_rotary_factor=0.5: Gemma3ForCausalLM rotates whole heads",
        ),
    ],
)
def test_unsupported_values_of_gemma_3_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read_architecture(write_gemma_config(tmp_path, **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"activation": "gelu"}, r"model.activation=gelu: LlamaForCausalLM.* has swiglu"),
        ({"family": "qwen2"}, r"model.bias=None: Qwen2ForCausalLM.* has qkv"),
        ({"family": "mistral", "logit_scale": 0.5}, r"model.logit_scale=0.5: Mistral"),
        ({"family": "gpt2", "max_position_embeddings": 64}, r"model\.\w+=.*GPT2LMHeadModel"),
        (
            GEMMA_3 | {"family": "mistral"},
            r"model\.sliding_window_pattern=2: MistralForCausalLM.* has 1",
        ),
        (GEMMA_3 | {"query_pre_attn_scalar": None}, "model.query_pre_attn_scalar=None: Gemma3"),
        (
            GEMMA_3
            | {"sliding_window_pattern": 1, "local_rope_theta": None, "sliding_window": None},
            "model.family=gemma3_text: Gemma3ForCausalLM cannot express this model: layer_types=",
        ),
        (
            GEMMA_3 | {"rotary_percent": 0.5},
            "model.rotary_percent=0.5: Gemma3ForCausalLM, .* has 1.0",
        ),
    ],
)
def test_a_model_that_its_family_does_not_compute_is_refused(
    model: dict[str, Any], message: str
) -> None:
    architecture = tiny_recipe(Path("runs"), model=model).model
    with pytest.raises(RecipeError, match=message):
        check_family(architecture)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_size": 12, "rope_scaling": {"factor": 8, "original_max_position_embeddings": 64}},
        {"family": "qwen3", "qk_norm": "head"},  # head_size None: hidden_size / num_heads
        GEMMA_3 | {"rope_scaling": {"kind": "linear", "factor": 8}},
    ],
)
def test_a_written_configuration_is_parsed_to_the_same_architecture(
    settings: dict[str, Any],
) -> None:
    from transformers import AutoConfig

    sizes = {
        "num_layers": 5,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    sizes |= {"num_embeddings": 99, "max_position_embeddings": 7}
    written = Architecture.model_validate(sizes | settings)
    config = AutoConfig.for_model(**make_config(written, max_positions=5, num_embeddings=99))
    assert parse_architecture(config.to_dict()) == written
