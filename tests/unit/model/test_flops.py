"""FLOPs and parameter counts against transformers' models of the same shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ul2r.config import Architecture
from ul2r.model.flops import num_active_parameters, num_parameters, num_visible_keys, training_flops
from ul2r.model.huggingface.config_json import parse_architecture

SMALL = Architecture(num_layers=3, hidden_size=48, ffn_hidden_size=80, num_heads=6, num_kv_heads=2)


def make_llama(architecture: Architecture, vocabulary_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_parameters_equal_those_of_a_llama() -> None:
    assert num_parameters(SMALL, 101) == make_llama(SMALL, 101).num_parameters()


def test_flops_equal_torchs_count_for_full_attention() -> None:
    """torch counts forward matrix products; the backward pass costs twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_llama(SMALL, 101)
    length = 32
    # So that torch's counter sees attention's products, all S x S of them.
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), logits_to_keep=7)
    ours = training_flops(SMALL, 101, length, num_visible_keys=3 * length * length, num_targets=7)
    assert ours == pytest.approx(3 * counted.get_total_flops(), rel=1e-6)


def test_parameters_equal_those_of_a_mixtral() -> None:
    """The authors state 12.9 B active of 46.7 B parameters."""
    config = MixtralConfig()
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    architecture = parse_architecture(config.to_dict())
    assert num_parameters(architecture, 32_000) == model.num_parameters() == 46_702_792_704
    assert num_active_parameters(architecture, 32_000) == pytest.approx(12.9e9, rel=2e-3)


def test_flops_of_experts_equal_torchs_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=101, num_local_experts=4, **sizes, **heads)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = MixtralForCausalLM(config)
    length = 32
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.arange(length)[None])
    architecture = parse_architecture(config.to_dict())
    ours = training_flops(architecture, 101, length, 3 * length * length, num_targets=length)
    assert ours == pytest.approx(3 * counted.get_total_flops(), rel=1e-6)


def test_a_layer_with_a_window_sees_fewer_keys() -> None:
    """Five layers with a window and one without, a prefix of 5 in rows of 9."""
    model = Architecture.model_validate(
        SMALL.model_dump()
        | {
            "num_layers": 6,
            "sliding_window": 3,
            "sliding_window_pattern": 6,
            "local_rope_theta": 100,
        }
    )
    kv_end = np.maximum(np.arange(1, 10, dtype=np.int32), 5)[None].repeat(2, axis=0)
    pairs = [(query, key) for query in range(9) for key in range(kv_end[0, query])]
    near_pairs = [(query, key) for query, key in pairs if abs(query - key) < 3]
    assert num_visible_keys(model, 0 * kv_end, kv_end) == 2 * (len(pairs) + 5 * len(near_pairs))
