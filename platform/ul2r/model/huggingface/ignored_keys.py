"""Keys of config.json that do not change what a model computes, always or at certain values.

Every other key that a family's table does not name is refused. The class of the installed transformers reads none of
these keys, or reads them for something else than the logits of a forward pass.
"""

from __future__ import annotations

from typing import Any

HOUSEKEEPING = (
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "architectures", "model_type"),
    *("transformers_version", "dtype", "torch_dtype", "use_bfloat16", "torchscript", "xla_device"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("_experts_implementation", "experts_implementation", "_flash_attn_2_enabled"),
    *("use_cache", "output_past", "return_dict", "use_return_dict", "output_attentions"),
    *("output_hidden_states", "tie_last_hidden_states", "gradient_checkpointing"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "tf_legacy_loss"),
)
"""Attributes of every class of transformers 4 and 5: where a model comes from, how it is run and what it returns."""
TEXT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("cls_token_id", "mask_token_id", "decoder_start_token_id", "tokenizer_class", "prefix"),
    *("model_max_length", "max_sequence_length", "seq_length", "cache_implementation"),
    *("task_specific_params", "predict_special_tokens", "n_special", "n_ctx"),
)
"""Special tokens, which the token store's vocabulary defines instead; lengths and tasks of pipelines."""
NOISE = (
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "neftune_noise_alpha"),
)
"""Properties of a training run; runs here have no dropout and no noise."""
OTHER_HEADS = (
    *("classifier_dropout", "id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
    *("finetuning_task", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("summary_type", "summary_use_proj"),
)
BALANCING = ("router_aux_loss_coef", "output_router_logits")
"""Properties of a training run as well; runs here have `optimizer.moe_aux_loss_coeff`."""
OTHER_TOOLS = (
    *("transformers.js_config", "custom_pipelines", "unsloth_fixed", "unsloth_version"),
    "is_llama_config",
)
UNUSED = (
    "max_window_layers",  # only read where use_sliding_window is true, which is refused
    *("_sliding_window_pattern", "sliding_window_pattern"),  # superseded by layer_types
    # Asked transformers 4 to compute in slices, to reproduce the rounding of tensor-parallel pretraining.
    "pretraining_tp",
)
IGNORED_KEYS = frozenset(
    (*HOUSEKEEPING, *TEXT, *NOISE, *OTHER_HEADS, *BALANCING, *OTHER_TOOLS, *UNUSED)
)
"""Keys that mean nothing for the model, whatever their value."""
INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),  # Falcon 3's, next to hidden_act
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "bias": (False,),
    "clip_qkv": (None,),
    "cross_attention_hidden_size": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True,),
    "is_decoder": (False,),
    "mlp_bias": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qk_layernorm": (False,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Features that a family's class does not have, at the values that ask for none of them."""
