"""Small exports with random weights, one per family, with heads that vLLM's kernels for CPUs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ul2r.data.tokenizer import train_tokenizer
from ul2r.testing.exports import write_random_export
from ul2r.testing.families import MODELS
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
    settings: dict[str, Any] = {**MODELS[family], "vocab_size": tokenizer.get_vocab_size()}
    settings |= GPT2_SIZES if family == "GPT-2" else SIZES
    if family == "Mistral":
        settings["sliding_window"] = 12  # shorter than prompts and answers
    return write_random_export(
        folder, settings, tokenizer, max_positions=256, attention=attention, seed=5
    )
