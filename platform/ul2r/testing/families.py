"""Small random models of Hugging Face's own classes, at least one per family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 500,  # not a multiple of 128, so that exports must drop padding rows
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_3 = {
    "model_type": "gemma3_text",
    **SMALL,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,  # shorter than the rows of the tests and than their inputs
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama", **SMALL, "num_key_value_heads": 4},
    "Llama 3.2": {
        "model_type": "llama",
        **SMALL,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA_3_ROPE,
    },
    # The head is wider than hidden_size / num_attention_heads, in Qwen3 as well.
    "Mistral": {"model_type": "mistral", **SMALL, "head_dim": 16, "sliding_window": 64},
    "Qwen2.5": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    "Qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    # Half of each head is rotated. The class has no setting for key/value heads: `make_random_model` removes it.
    "GPT-NeoX": {
        "model_type": "gpt_neox",
        **SMALL,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "GPT-NeoX, sequential": {
        "model_type": "gpt_neox",
        **SMALL,
        "num_key_value_heads": 4,
        "use_parallel_residual": False,
    },
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 500,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
    },
    "OLMo 2": {"model_type": "olmo2", **SMALL},
    "Cohere": {"model_type": "cohere", **SMALL},
    "Mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4},
    "Gemma 3": GEMMA_3,
    "Gemma 3, scaled rope": {
        **GEMMA_3,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
        "layer_types": [*3 * ["sliding_attention"], "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
        },
    },
}


def make_random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Make one of `MODELS` with weights of `make_model_of`."""
    settings = dict(MODELS[name])
    if settings["model_type"] == "gpt_neox":
        del settings["num_key_value_heads"]
    return make_model_of(settings, seed)


def make_model_of(settings: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """Make the model of some keys of a config.json, with weights so large that each of them changes every logit."""
    no_special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(**settings, **no_special_tokens)
    # The caller's random state stays as it is.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            # transformers begins with norms of 1 and biases of 0: an import that swapped two of them would go
            # unnoticed.
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def write_random_model(name: str, folder: Path, shard_size: str = "5GB") -> PreTrainedModel:
    """Write a random model with transformers and return it."""
    model = make_random_model(name)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@torch.no_grad()
def compute_reference_logits(model: PreTrainedModel, tokens: Tensor, prefix: int) -> Tensor:
    """Compute logits with transformers, where the first `prefix` tokens of each row are visible to all.

    In layers with a window they are visible within the window only.
    """
    position = torch.arange(tokens.shape[1])
    # (S, S): query i sees the keys before max(i + 1, prefix).
    is_visible = position[None] < torch.clamp(position + 1, min=prefix)[:, None]
    # (B, 1, S, S): transformers uses a 4-D mask as it is, without adding its causal one.
    is_visible = is_visible.expand(len(tokens), 1, -1, -1)
    mask: Tensor | dict[str, Tensor] = is_visible
    if model.config.model_type == "gemma3_text":
        # transformers does not clip a mask that it is given to the window.
        is_near = (position[None] - position[:, None]).abs() < model.config.sliding_window
        mask = {"full_attention": is_visible, "sliding_attention": is_visible & is_near}
    logits: Tensor = model(tokens, attention_mask=mask).logits
    return logits
