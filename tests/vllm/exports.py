"""Small exports with random weights, one per family, with heads that vLLM's kernels for CPUs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.exporting import write_export
from ul2r.model.huggingface.safetensors_writer import StreamedTensor
from ul2r.testing.families import MODELS, make_model_of
from ul2r.testing.models import TEXTS

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
GPT2_SIZES = {"n_embd": 128, "n_positions": 256}
FAMILIES = (
    "Llama 2",
    "Llama 3.2",
    "Mistral",
    "Qwen2.5",
    "Qwen3",
    "Gemma 3",
    "Gemma 3, scaled rope",
    "GPT-2",
    "Cohere",
    "Mixtral",
)
"""Of `MODELS`: those that ul2r-vllm has networks of."""


def write_family_export(
    folder: Path, family: str, attention: Literal["prefix", "causal"] = "prefix"
) -> Path:
    """Write an export as `ul2r export` does."""
    tokenizer = train_tokenizer(TEXTS, 300, num_sentinels=8)
    vocabulary = build_vocabulary(tokenizer)
    settings: dict[str, Any] = {**MODELS[family], "vocab_size": vocabulary.size}
    settings |= GPT2_SIZES if family == "GPT-2" else SIZES
    if family == "Mistral":
        settings["sliding_window"] = 12  # shorter than prompts and answers
    original = folder.with_name(f"{folder.name}-original")
    make_model_of(settings, seed=5).save_pretrained(original)
    tokenizer_file = original / "tokenizer.json"
    tokenizer.save(str(tokenizer_file))
    weights = load_file(original / "model.safetensors")
    write_export(
        folder,
        {name: StreamedTensor.of(tensor) for name, tensor in weights.items()},
        architecture=read_architecture(original),
        max_positions=256,
        metadata=ExportMetadata(
            run=family,
            role="ul2r",
            attention=attention,
            denoising=True,
            step=1,
            tokens=1,
            flops=1.0,
            checkpoint="none",
            vocabulary=vocabulary,
        ),
        tokenizer=tokenizer_file,
        shard_bytes=2**30,
    )
    return folder
