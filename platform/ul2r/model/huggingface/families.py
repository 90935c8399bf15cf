"""Tables of the families. To add one: a table here, its name in `FamilyName`, a line in the tests' list."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ul2r.config.architecture import FamilyName
from ul2r.model.huggingface.family import Family, Settings
from ul2r.model.tensors import EXPERTS

# Megatron's names of a layer's tensors, without their last part ("weight", "bias").
ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_"
MLP_NORM = "mlp.linear_fc1.layer_norm_"
QKV = "self_attention.linear_qkv."
PROJECTION = "self_attention.linear_proj."
QUERY_NORM = "self_attention.q_layernorm."
KEY_NORM = "self_attention.k_layernorm."
UP = "mlp.linear_fc1."
DOWN = "mlp.linear_fc2."

# A key that may only be false.
NO: tuple[tuple[Any, Settings], ...] = ((False, {}),)

LLAMA = Family(
    model_class="LlamaForCausalLM",
    sizes={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "num_embeddings": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
    choices={
        "hidden_act": (("silu", {}),),
        "attention_bias": NO,
        "mlp_bias": NO,
    },
    always={},
    outer={
        "embedding.word_embeddings.weight": "embed_tokens.weight",
        "decoder.final_layernorm.weight": "norm.weight",
    },
    inner={
        ATTENTION_NORM: "input_layernorm.",
        QKV: ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        PROJECTION: "self_attn.o_proj.",
        MLP_NORM: "post_attention_layernorm.",
        # Megatron's SwiGLU applies the activation to the first half of the fused matrix.
        UP: ("mlp.gate_proj.", "mlp.up_proj."),
        DOWN: "mlp.down_proj.",
    },
)

MISTRAL = replace(
    LLAMA,
    model_class="MistralForCausalLM",
    sizes={**LLAMA.sizes, "sliding_window": "sliding_window"},
    choices={"hidden_act": (("silu", {}),)},
)

QWEN2 = replace(
    LLAMA,
    model_class="Qwen2ForCausalLM",
    choices={
        "hidden_act": (("silu", {}),),
        "use_sliding_window": NO,
        "sliding_window": ((None, {}),),
    },
    # Not a key of config.json: the class always has these biases.
    always={"bias": "qkv"},
)

QWEN3 = replace(
    LLAMA,
    model_class="Qwen3ForCausalLM",
    choices={**QWEN2.choices, "attention_bias": NO},
    always={"qk_norm": "head"},
    inner={
        **LLAMA.inner,
        QUERY_NORM: "self_attn.q_norm.",
        KEY_NORM: "self_attn.k_norm.",
    },
)

OLMO2 = replace(
    LLAMA,
    model_class="Olmo2ForCausalLM",
    choices={"hidden_act": (("silu", {}),), "attention_bias": NO},
    always={"block": "post_norm", "qk_norm": "full"},
    # No norm before attention and MLP, so Llama's names for these are absent.
    inner={
        **{name: LLAMA.inner[name] for name in (QKV, PROJECTION, UP, DOWN)},
        QUERY_NORM: "self_attn.q_norm.",
        KEY_NORM: "self_attn.k_norm.",
        "post_attention_layernorm.": "post_attention_layernorm.",
        "post_mlp_layernorm.": "post_feedforward_layernorm.",
    },
)

MIXTRAL = replace(
    MISTRAL,
    model_class="MixtralForCausalLM",
    sizes={
        **MISTRAL.sizes,
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
    },
    choices={**MISTRAL.choices, "router_jitter_noise": ((0.0, {}),)},
    inner={
        **{name: LLAMA.inner[name] for name in (ATTENTION_NORM, QKV, PROJECTION)},
        "pre_mlp_layernorm.": "post_attention_layernorm.",
        "mlp.router.": "block_sparse_moe.gate.",
        # w1 is the gate, w3 the linear input, w2 the output.
        EXPERTS + "linear_fc1.": (
            "block_sparse_moe.experts.{}.w1.",
            "block_sparse_moe.experts.{}.w3.",
        ),
        EXPERTS + "linear_fc2.": "block_sparse_moe.experts.{}.w2.",
    },
)

COHERE = replace(
    LLAMA,
    model_class="CohereForCausalLM",
    sizes={
        **LLAMA.sizes,
        "norm_epsilon": "layer_norm_eps",
        "logit_scale": "logit_scale",
    },
    choices={"hidden_act": (("silu", {}),), "attention_bias": NO, "use_qk_norm": NO},
    always={"block": "parallel", "norm": "layer", "rope_interleaved": True},
    # One norm for attention and MLP.
    inner={name: parts for name, parts in LLAMA.inner.items() if name != MLP_NORM},
)

GEMMA3 = replace(
    LLAMA,
    model_class="Gemma3ForCausalLM",
    sizes={
        **LLAMA.sizes,
        "sliding_window": "sliding_window",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
    },
    choices={
        "hidden_activation": (("gelu_pytorch_tanh", {}),),
        "attention_bias": NO,
        "use_bidirectional_attention": ((False, {}), (None, {})),
        "attn_logit_softcapping": ((None, {}),),
        "final_logit_softcapping": ((None, {}),),
    },
    always={
        "block": "sandwich",
        "norm_zero_centered": True,
        "qk_norm": "head",
        "activation": "geglu",
        "scale_embedding": True,
    },
    inner={
        **QWEN3.inner,
        # Llama's norm before the MLP has this name; here it is the one after attention.
        "post_attention_layernorm.": "post_attention_layernorm.",
        MLP_NORM: "pre_feedforward_layernorm.",
        "post_mlp_layernorm.": "post_feedforward_layernorm.",
    },
    local_layers=True,
)

GPT_NEOX = Family(
    model_class="GPTNeoXForCausalLM",
    # No grouped queries and no head width of its own.
    sizes={
        **{
            name: key
            for name, key in LLAMA.sizes.items()
            if name not in ("num_kv_heads", "head_size")
        },
        "norm_epsilon": "layer_norm_eps",
    },
    choices={
        "hidden_act": (
            ("gelu", {"activation": "gelu"}),
            ("gelu_new", {"activation": "gelu_tanh"}),
            ("gelu_pytorch_tanh", {"activation": "gelu_tanh"}),
            ("gelu_fast", {"activation": "gelu_tanh"}),  # GPT-NeoX 20B
        ),
        "use_parallel_residual": (
            # Unlike PaLM's parallel block, attention and MLP each have a norm.
            (True, {"block": "parallel_two_norms"}),
            (False, {"block": "sequential"}),
        ),
        "attention_bias": ((True, {}),),
        "is_decoder": NO,
    },
    always={"norm": "layer", "norm_bias": True, "bias": "all"},
    outer={
        "embedding.word_embeddings.weight": "embed_in.weight",
        "decoder.final_layernorm.weight": "final_layer_norm.weight",
        "decoder.final_layernorm.bias": "final_layer_norm.bias",
    },
    inner={
        ATTENTION_NORM: "input_layernorm.",
        QKV: "attention.query_key_value.",
        PROJECTION: "attention.dense.",
        MLP_NORM: "post_attention_layernorm.",
        UP: "mlp.dense_h_to_4h.",
        DOWN: "mlp.dense_4h_to_h.",
    },
    base="gpt_neox.",
    output="embed_out.weight",
    qkv="by_group",
    partial_rotary=True,
    unused_suffixes=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)

GPT2 = Family(
    model_class="GPT2LMHeadModel",
    sizes={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "ffn_hidden_size": "n_inner",
        "num_heads": "n_head",
        "num_embeddings": "vocab_size",
        "max_position_embeddings": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
    choices={
        "activation_function": (
            ("gelu_new", {"activation": "gelu_tanh"}),
            ("gelu_pytorch_tanh", {"activation": "gelu_tanh"}),
            ("gelu", {"activation": "gelu"}),
        ),
        "scale_attn_weights": ((True, {}),),
        "scale_attn_by_inverse_layer_idx": NO,
        "reorder_and_upcast_attn": NO,
        "add_cross_attention": NO,
    },
    always={
        "norm": "layer",
        "norm_bias": True,
        "bias": "all",
        "position_embedding": "learned",
    },
    outer={
        "embedding.word_embeddings.weight": "wte.weight",
        "embedding.position_embeddings.weight": "wpe.weight",
        "decoder.final_layernorm.weight": "ln_f.weight",
        "decoder.final_layernorm.bias": "ln_f.bias",
    },
    inner={
        ATTENTION_NORM: "ln_1.",
        QKV: "attn.c_attn.",
        PROJECTION: "attn.c_proj.",
        MLP_NORM: "ln_2.",
        UP: "mlp.c_fc.",
        DOWN: "mlp.c_proj.",
    },
    layer="h.{}.",
    base="transformer.",
    qkv="concatenated",
    # transformers stores GPT-2's matrices in Conv1D modules, as (inputs, outputs).
    transposed=True,
    unused_suffixes=("attn.bias", "attn.masked_bias"),
)

FAMILIES: dict[FamilyName, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "olmo2": OLMO2,
    "cohere": COHERE,
    "mixtral": MIXTRAL,
    "gemma3_text": GEMMA3,
}

UNSUPPORTED = {
    "gemma2": "its attention scores are capped by a tanh",
    "gemma3": "it reads images; its text model is gemma3_text",
}
"""Model types that are often asked for, and the reason why they are not supported."""
