"""Exports with random weights of Hugging Face's own classes, for any family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from tokenizers import Tokenizer

from ul2r.data.tokenizer import build_vocabulary
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.exporting import write_export
from ul2r.model.huggingface.safetensors_writer import StreamedTensor
from ul2r.paths import TOKENIZER_FILE
from ul2r.testing.families import make_model_of


def write_random_export(
    folder: Path,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    max_positions: int,
    attention: Literal["prefix", "causal"] = "prefix",
    seed: int = 0,
) -> Path:
    """Write an export as `ul2r export` does; the model as transformers writes it stays next to it.

    Args:
        folder: Destination.
        settings: Of the model's config.json, see `ul2r.testing.families.MODELS`.
        tokenizer: With special tokens; the model may have more rows than it has tokens.
        max_positions: Longest sequence.
        attention: Attention in training, according to ul2r.json.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    original = folder.with_name(f"{folder.name}-original")
    make_model_of(settings, seed=seed).save_pretrained(original)
    tokenizer.save(str(original / TOKENIZER_FILE))
    weights = load_file(original / "model.safetensors")
    write_export(
        folder,
        {name: StreamedTensor.of(tensor) for name, tensor in weights.items()},
        architecture=read_architecture(original),
        max_positions=max_positions,
        metadata=ExportMetadata(
            run=folder.name,
            role="ul2r",
            attention=attention,
            denoising=True,
            step=1,
            tokens=1,
            flops=1.0,
            checkpoint="none",
            vocabulary=build_vocabulary(tokenizer),
        ),
        tokenizer=original / TOKENIZER_FILE,
        shard_bytes=2**30,
    )
    return folder
