"""Conversion of GGUF files of Llamas, Qwens and Gemmas to Hugging Face folders, in float32 and without their blocks.

What llama.cpp's convert_hf_to_gguf.py did is undone: the order of Llama's rotary dimensions, the 1 that it adds to
Gemma's norms. Weights pass through memory a few rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ul2r.config import Architecture
from ul2r.config.architecture import FamilyName
from ul2r.config.validation_errors import explain
from ul2r.errors import CheckpointError
from ul2r.filesystem import staging_dir
from ul2r.model.huggingface.config_json import make_config
from ul2r.model.huggingface.families import FAMILIES
from ul2r.model.huggingface.family import tensor_shapes
from ul2r.model.huggingface.gguf_file import GgufFile
from ul2r.model.huggingface.gguf_tokenizer import (
    find_special_ids,
    make_tokenizer,
    name_special_tokens,
)
from ul2r.model.huggingface.safetensors_writer import StreamedTensor, write_weights
from ul2r.paths import TOKENIZER_FILE

ARCHITECTURES: Mapping[str, FamilyName] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
"""From general.architecture to families."""
SIZES = {
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "ffn_hidden_size": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""From settings of `Architecture` to keys after the architecture's name."""
READ_KEYS = {
    *SIZES.values(),
    *("vocab_size", "attention.layer_norm_rms_epsilon", "attention.value_length"),
    *("attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
    *("rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
    "rope.scale_linear",
}
"""Keys after the architecture's name whose effect is known: another one is refused."""
INERT = {"attention.causal": True}
"""Values of further keys that change nothing; 0 and false of any other."""
GEMMA_PATTERN = 6
GEMMA_LOCAL_ROPE_THETA = 10_000
GEMMA_27B_LAYERS = 62
"""Values that llama.cpp has in its source and not in files (src/llama-model.cpp, LLM_ARCH_GEMMA3)."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies of Llama 3.1 and newer."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as transformers writes them."""
BLOCK_ELEMENTS = 2**22
"""Elements of a matrix that are converted at a time."""


def import_gguf(file: Path, folder: Path) -> str:
    """Convert a GGUF file to a Hugging Face folder that can be the base of a run; return a line that describes it.

    Args:
        file: The file.
        folder: Destination, which must not exist.

    Raises:
        CheckpointError: If the file cannot be read, its architecture, one of its settings or its tokenizer is not
            supported, or the destination exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists: name a new folder, or remove it")
    gguf = GgufFile(file)
    try:
        architecture = read_gguf_architecture(gguf)
        tensors = convert_gguf_tensors(gguf, architecture)
        tokenizer = make_tokenizer(gguf.metadata)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {explain(error, Architecture)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{file}: has no {error.args[0]}: it is not a whole model") from None

    with staging_dir(folder) as staging:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_weights(staging, tensors, SHARD_BYTES)
        tokenizer.save(str(staging / TOKENIZER_FILE))
        _write_configs(staging, architecture, gguf.metadata)
    kinds = sorted({tensor.kind for tensor in gguf.tensors.values()})
    return (
        f"{folder}: {architecture.family}, {len(tensors)} tensors of {total / 4e6:,.1f} M parameters in float32, "
        f"which were {', '.join(kinds)}"
    )


def read_gguf_architecture(gguf: GgufFile) -> Architecture:
    """Return the model that a file's metadata and tensors describe.

    Raises:
        CheckpointError: Naming the first thing that is not supported.
        KeyError: If a key is missing.
        ValidationError: If sizes do not fit each other.
    """
    name = _check_kind(gguf.metadata)
    keys = _take_keys(gguf.metadata, f"{name}.")
    settings: dict[str, Any] = {setting: keys[key] for setting, key in SIZES.items() if key in keys}
    settings.setdefault("num_kv_heads", settings.get("num_heads"))
    embedding = gguf.tensors["token_embd.weight"]
    settings |= {
        "family": ARCHITECTURES[name],
        **FAMILIES[ARCHITECTURES[name]].always,
        "num_embeddings": embedding.shape[0],
        "tie_embeddings": "output.weight" not in gguf.tensors,
        # The shortest number that is this float32: 1e-5, not 9.999999747378752e-06.
        "norm_epsilon": float(str(np.float32(keys["attention.layer_norm_rms_epsilon"]))),
        **_read_rope(keys, gguf),
    }
    if name == "gemma3":
        settings |= _read_gemma(keys)
    elif "attention.sliding_window" in keys:
        raise CheckpointError(f"{name}.attention.sliding_window: only gemma3 may have it")

    architecture = Architecture(**settings)
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key, architecture.head_dim) != architecture.head_dim:
            raise CheckpointError(
                f"{name}.{key}={keys[key]}: only the width of a head, {architecture.head_dim}, is supported"
            )
    # As `_take_sizes` of config_json.py: equal models have equal settings.
    if architecture.head_size == architecture.hidden_size / architecture.num_heads:
        architecture = architecture.model_copy(update={"head_size": None})
    return architecture


def convert_gguf_tensors(gguf: GgufFile, architecture: Architecture) -> dict[str, StreamedTensor]:
    """Map a file to the family's tensors by name; nothing is converted until a tensor's blocks are requested.

    Raises:
        CheckpointError: If a tensor is missing, has another shape, or has no place in the family's class.
    """
    family = FAMILIES[architecture.family]
    assert architecture.num_embeddings is not None
    unused = set(gguf.tensors) - {ROPE_FACTORS}
    tensors = {}
    for name, shape in tensor_shapes(family, architecture, architecture.num_embeddings).items():
        stored_name = _name_in_gguf(name, architecture)
        stored = gguf.tensors.get(stored_name)
        if stored is None or stored.shape != shape:
            found = "is missing" if stored is None else f"has shape {stored.shape}"
            raise CheckpointError(f"tensor {stored_name} {found}; it should have {shape}")
        unused.discard(stored_name)
        read_blocks = partial(_iter_blocks, gguf, stored_name, architecture)
        tensors[name] = StreamedTensor(shape, torch.float32, read_blocks)
    if unused:
        raise CheckpointError(
            f"{len(unused)} of its tensors have no place in {family.model_class}, the first {min(unused)}"
        )
    return tensors


def _check_kind(metadata: Mapping[str, Any]) -> str:
    """Return the name of the architecture, a key of `ARCHITECTURES`."""
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge"
        )
    name: str = metadata["general.architecture"]
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"models of architecture {name!r} cannot be imported; supported are {', '.join(ARCHITECTURES)}"
        )
    return name


def _take_keys(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values whose keys begin with the architecture's name; refuse those whose effect is not known."""
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    for key, value in keys.items():
        if key in SIZES.values() and not isinstance(value, int):
            raise CheckpointError(
                f"{prefix}{key}={value}: only one value for all layers is supported"
            )
        if key not in READ_KEYS and (isinstance(value, np.ndarray) or value != INERT.get(key, 0)):
            raise CheckpointError(
                f"{prefix}{key}={value}: unknown key, its effect on the model would be lost"
            )
    return keys


def _name_in_gguf(name: str, architecture: Architecture) -> str:
    names = GEMMA_NAMES if architecture.family == "gemma3_text" else NAMES
    stem, _, kind = name.rpartition(".")
    if layer := LAYER.fullmatch(stem):
        return f"blk.{layer[1]}.{names[layer[2]]}.{kind}"
    return f"{names[stem]}.{kind}"


def _iter_blocks(gguf: GgufFile, name: str, architecture: Architecture) -> Iterator[Tensor]:
    """Yield blocks of rows of one tensor, as the family's class has them."""
    num_rows = gguf.tensors[name].shape[0]
    num_columns = gguf.tensors[name].shape[1] if len(gguf.tensors[name].shape) > 1 else 1
    head = architecture.head_dim
    # Whole heads, whose rows are reordered.
    step = max(BLOCK_ELEMENTS // (num_columns * head), 1) * head
    is_rotated = name.endswith(("attn_q.weight", "attn_k.weight"))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        values = gguf.read_rows(name, start, stop)
        if architecture.family == "llama" and is_rotated:
            # llama.cpp has the two dimensions of each rotated pair next to each other: LlamaModel.permute.
            pairs = values.reshape(-1, head // 2, 2, num_columns)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if architecture.norm_zero_centered and name.endswith("norm.weight"):
            values = values - np.float32(1)
        # A copy, since mapped pages are read-only and torch warns of them.
        yield torch.from_numpy(values.copy())


def _read_rope(keys: Mapping[str, Any], gguf: GgufFile) -> dict[str, Any]:
    """Return the settings of rotary positions."""
    theta = keys.get("rope.freq_base", 10_000.0)
    if theta != int(theta):
        raise CheckpointError(f"rope.freq_base={theta}: only a whole number is supported")
    settings: dict[str, Any] = {"rope_theta": int(theta)}
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if ROPE_FACTORS in gguf.tensors:
        settings["rope_scaling"] = _find_llama3_scaling(gguf, int(theta))
    elif kind == "linear" or (kind == "none" and "rope.scale_linear" in keys):
        settings["rope_scaling"] = {"kind": "linear", "factor": factor} if factor != 1 else None
    elif kind != "none":
        raise CheckpointError(f"rope.scaling.type={kind}: only none and linear are supported")
    return settings


def _find_llama3_scaling(gguf: GgufFile, theta: int) -> dict[str, Any]:
    """Find the settings of Llama 3's scaling that give a file's divisors of frequencies.

    The lowest frequency is divided by the full factor; the other three numbers are those of all Llamas.
    """
    (count,) = gguf.tensors[ROPE_FACTORS].shape
    stored = gguf.read_rows(ROPE_FACTORS, 0, count).astype(np.float64)
    factor = float(stored[-1])
    low, high, original = 1.0, 4.0, 8192

    turns = original / (2 * np.pi) * theta ** -(np.arange(count) / count)
    # transformers' _compute_llama3_parameters, as divisors.
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(stored, expected, rtol=1e-4):
        raise CheckpointError(f"{ROPE_FACTORS}: other than Llama 3's scaling of rotary positions")
    return {"kind": "llama3", "factor": factor}


def _read_gemma(keys: Mapping[str, Any]) -> dict[str, Any]:
    scalar = keys.get("attention.key_length")
    if keys["block_count"] == GEMMA_27B_LAYERS:
        scalar = keys["embedding_length"] // keys["attention.head_count"]
    return {
        "sliding_window": keys["attention.sliding_window"],
        "sliding_window_pattern": GEMMA_PATTERN,
        "local_rope_theta": int(keys.get("rope.freq_base_swa", GEMMA_LOCAL_ROPE_THETA)),
        "query_pre_attn_scalar": scalar,
    }


def _write_configs(folder: Path, architecture: Architecture, metadata: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and what belongs to the tokenizer."""
    assert architecture.num_embeddings is not None
    assert architecture.max_position_embeddings is not None
    found = find_special_ids(metadata)
    special_ids = {f"{name}_token_id": found.get(name) for name in ("bos", "eos", "pad")}
    config = make_config(
        architecture, architecture.max_position_embeddings, architecture.num_embeddings
    )
    AutoConfig.for_model(**config, **special_ids, dtype=torch.float32).save_pretrained(folder)
    GenerationConfig(**special_ids).save_pretrained(folder)

    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **name_special_tokens(metadata),
        "model_max_length": architecture.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
