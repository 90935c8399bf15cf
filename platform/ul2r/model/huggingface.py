"""A checkpoint in Hugging Face form: a Llama folder that `transformers` loads with the same logits."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import GenerationConfig, LlamaConfig

from ul2r.config import Architecture
from ul2r.objective.vocabulary import Vocabulary

FORMAT = 3
"""Of ul2r.json."""


@dataclass(frozen=True)
class Card:
    """What ul2r.json tells serving and evaluation, beside the vocabulary.

    Attributes:
        run: Name of the run.
        role: Its place in a comparison, if it has one.
        attention: "prefix" where inputs were seen in both directions in training, else "causal".
        denoising: Whether it was trained on denoisers, and so knows modes and sentinels.
        step: Optimizer steps of the run.
        tokens: Row positions trained on, its ancestors' included.
        flops: Training FLOPs, its ancestors' included.
        checkpoint: Identity of the checkpoint that was exported.
    """

    run: str
    role: str | None
    attention: str
    denoising: bool
    step: int
    tokens: int
    flops: float
    checkpoint: str


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole model's tensors of a distributed checkpoint of any layout; optimizer state is not read.

    Megatron-Core's `torch_dist` format is torch's own distributed checkpoint, which needs no process group.

    Args:
        checkpoint: Folder that `CheckpointStore.save` wrote.

    Returns:
        Tensors by Megatron's names; those of layers have the layer as their first axis.
    """
    reader = FileSystemReader(checkpoint)
    weights = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        for key, found in reader.read_metadata().state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # as is meant here
        load(weights, storage_reader=reader, no_dist=True)
    return weights


def llama_weights(
    weights: Mapping[str, Tensor], architecture: Architecture, vocabulary_size: int
) -> dict[str, Tensor]:
    """Megatron's tensors under Llama's names.

    Megatron keeps query, key and value of a key/value group side by side, gate and up projection
    in one matrix, and each norm with the projection that follows it.

    Args:
        weights: From `read_weights`.
        architecture: Sizes.
        vocabulary_size: Rows of the embedding to keep; padding is cut.
    """
    renamed = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocabulary_size],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    for layer in range(architecture.layers):
        here = {name: weights[f"decoder.layers.{name}"][layer] for name in LAYER_TENSORS}
        query, key, value = _split_groups(here["self_attention.linear_qkv.weight"], architecture)
        gate, up = here["mlp.linear_fc1.weight"].chunk(2)
        for name, tensor in {
            "input_layernorm": here["self_attention.linear_qkv.layer_norm_weight"],
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": here["self_attention.linear_proj.weight"],
            "post_attention_layernorm": here["mlp.linear_fc1.layer_norm_weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": here["mlp.linear_fc2.weight"],
        }.items():
            renamed[f"model.layers.{layer}.{name}.weight"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in renamed.items()}


LAYER_TENSORS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


def _split_groups(fused: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """(G * (H/G + 2) * D, hidden) into query (H * D, hidden), key and value (G * D, hidden)."""
    groups, head = architecture.kv_heads, architecture.head_dim
    queries = architecture.heads // groups * head
    by_group = fused.view(groups, queries + 2 * head, -1)
    query, key, value = torch.split(by_group, [queries, head, head], dim=1)
    width = fused.shape[-1]
    return query.reshape(-1, width), key.reshape(-1, width), value.reshape(-1, width)


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    positions: int,
    vocabulary: Vocabulary,
    tokenizer: Path,
    card: Card,
) -> None:
    """Write a Llama folder beside, then rename it to `folder`, replacing an older one.

    Args:
        folder: Where the export goes.
        weights: Under Llama's names, from `llama_weights`.
        architecture: Sizes.
        positions: Longest sequence the model was trained on.
        vocabulary: Tokenizer size and special ids.
        tokenizer: The tokenizer.json to copy.
        card: What the export says of itself.
    """
    writing = folder.with_name(folder.name + ".writing")
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir(parents=True)
    save_file(dict(weights), writing / "model.safetensors", metadata={"format": "pt"})
    dtype = next(iter(weights.values())).dtype
    _llama_config(architecture, positions, vocabulary, dtype).save_pretrained(writing)
    GenerationConfig(eos_token_id=vocabulary.eos, pad_token_id=vocabulary.eos).save_pretrained(
        writing
    )
    shutil.copyfile(tokenizer, writing / "tokenizer.json")
    _write_json(
        writing / "tokenizer_config.json", _tokenizer_config(tokenizer, vocabulary, positions)
    )
    _write_json(
        writing / "ul2r.json",
        {"format": FORMAT, "vocabulary": vocabulary.to_dict(), **vars(card)},
    )
    if folder.exists():
        shutil.rmtree(folder)
    writing.rename(folder)


def _llama_config(
    architecture: Architecture, positions: int, vocabulary: Vocabulary, dtype: torch.dtype
) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary.size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=architecture.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(architecture.rope_base)},
        tie_word_embeddings=True,
        initializer_range=architecture.init_std,
        bos_token_id=None,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.eos,
        dtype=dtype,
    )


def _tokenizer_config(tokenizer: Path, vocabulary: Vocabulary, positions: int) -> dict[str, Any]:
    entries = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    text = {entry["id"]: entry["content"] for entry in entries}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text[vocabulary.eos],
        "pad_token": text[vocabulary.eos],
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
