"""Configurations of published models are read, whatever keys their files hold besides those of their class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from ul2r.errors import CheckpointError
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.ignored_keys import IGNORED_KEYS, INERT_VALUES

TRANSFORMERS_4 = {
    "_name_or_path": "somebody/model",
    "_commit_hash": None,
    "_attn_implementation_autoset": True,
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": 1,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": 2,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "4.46.0",
    "typical_p": 1.0,
    "unk_token_id": 0,
    "use_bfloat16": False,
    "use_cache": True,
}
"""What `to_dict` of any class of transformers 4 holds besides the model's own keys."""
LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT_2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
QWEN_2 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32000,
}
COHERE = {
    "model_type": "cohere",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 22528,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "pad_token_id": 0,
    "rope_theta": 8000000.0,
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 256000,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 2": LLAMA | {"pad_token_id": 0, "pretraining_tp": 2, "max_length": 4096},
    "SmolLM2": LLAMA
    | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "Falcon 3": LLAMA | {"activation": "swiglu", "head_dim": 256},
    "DeepSeek Coder": LLAMA | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "bias": False},
    "Llama by transformers 4": LLAMA | TRANSFORMERS_4,
    "Llama by Unsloth": LLAMA | {"unsloth_fixed": True, "unsloth_version": "2024.9"},
    "Qwen2.5": QWEN_2,
    "Mistral 7B v0.2": MISTRAL | {"attention_dropout": 0.0, "pretraining_tp": 1},
    "Mistral by transformers 4": MISTRAL | TRANSFORMERS_4,
    "Pythia": PYTHIA,
    # transformers 4.46 to 4.57 wrote the rotary settings under two names each.
    "Pythia by transformers 4.57": PYTHIA
    | TRANSFORMERS_4
    | {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_scaling": None},
    "GPT-NeoX 20B": PYTHIA
    | {"hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "Dolly 2": PYTHIA | {"custom_pipelines": {}, "gradient_checkpointing": False},
    "GPT-2 XL": GPT_2 | {"n_special": 0, "predict_special_tokens": True, "output_past": True},
    "distilgpt2": GPT_2
    | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "GPT-2 by transformers 4": GPT_2 | TRANSFORMERS_4,
    "Command R": COHERE,
}
"""Keys of published files, or of what a version of transformers writes for them; sizes where they matter."""


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read(tmp_path: Path, name: str) -> None:
    config = PUBLISHED[name]
    found = read_architecture(write_config(tmp_path, config))
    assert found.family == config["model_type"]
    assert found.num_layers == config.get("num_hidden_layers", config.get("n_layer"))
    if found.family == "gpt_neox":
        assert (found.rotary_percent, found.rope_theta) == (0.25, 10_000)


def test_the_activation_of_gpt_neox_20b_is_a_tanh(tmp_path: Path) -> None:
    folder = write_config(tmp_path, PUBLISHED["GPT-NeoX 20B"])
    assert read_architecture(folder).activation == "gelu_tanh"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["to_dict", "to_diff_dict"])
def test_the_defaults_of_each_class_are_read(tmp_path: Path, family: str, method: str) -> None:
    """transformers writes all keys of a configuration, or those that differ from its class's defaults."""
    config = AutoConfig.for_model(family)
    written = {"model_type": family, **getattr(config, method)()}
    found = read_architecture(write_config(tmp_path, written))
    assert found == read_architecture(write_config(tmp_path, {"model_type": family}))
    assert (found.num_layers, found.num_heads, found.tie_embeddings) == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.tie_word_embeddings,
    )


def test_every_generic_key_of_transformers_is_known() -> None:
    """A new one is a decision to take: it may change what a model computes."""
    generic = set(PreTrainedConfig().to_dict())
    # Those of generation are dropped by the class itself.
    assert not generic - IGNORED_KEYS - set(INERT_VALUES) - set(GenerationConfig().to_dict())


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("Qwen2.5", {"use_mrope": True}),
        ("Qwen2.5", {"use_sliding_window": True}),
        ("Qwen2.5", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
        ("SmolLM2", {"rope_interleaved": True}),
        ("SmolLM2", {"sliding_window": 4096}),
        ("SmolLM2", {"attention_bias": True}),
        ("SmolLM2", {"attn_logit_softcapping": 50.0}),
        ("SmolLM2", {"is_causal": False}),
        ("SmolLM2", {"pruned_heads": {"0": [1]}}),
        ("SmolLM2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("SmolLM2", {"no_rope_layers": [1, 1, 0]}),
        ("SmolLM2", {"partial_rotary_factor": 0.5}),
        ("Mistral 7B v0.2", {"attention_bias": True}),
        ("Mistral 7B v0.2", {"partial_rotary_factor": 0.5}),
        ("Command R", {"use_qk_norm": True}),
        ("Command R", {"partial_rotary_factor": 0.5}),
        ("GPT-2 XL", {"scale_attn_by_inverse_layer_idx": True}),
        ("GPT-2 XL", {"rotary_pct": 0.25}),
        # The class computes from rotary_pct and rotary_emb_base, which the file does not have.
        ("Pythia", {"partial_rotary_factor": 0.5}),
        ("Pythia", {"rope_theta": 500}),
        ("Pythia", {"head_dim": 16}),
    ],
)
def test_a_feature_that_would_be_lost_is_refused_by_name(
    tmp_path: Path, base: str, changes: dict[str, Any]
) -> None:
    (key,) = changes
    with pytest.raises(CheckpointError, match=f"{key}=") as refused:
        read_architecture(write_config(tmp_path, PUBLISHED[base] | changes))
    assert "\n" not in str(refused.value)


def test_a_configuration_that_its_class_refuses_ends_in_one_line(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_attention_heads": 7}, "hidden size .* is not a multiple"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"num_key_value_heads": 2}, "num_kv_heads=2 does not divide num_heads=9"),
    ):
        with pytest.raises(CheckpointError, match=message) as refused:
            read_architecture(write_config(tmp_path, LLAMA | changes))
        assert "\n" not in str(refused.value)
        assert "pydantic" not in str(refused.value)
