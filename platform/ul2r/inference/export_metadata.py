"""What an export folder says about itself, read without loading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ul2r.errors import CheckpointError
from ul2r.objective.vocabulary import Vocabulary

Attention = Literal["prefix", "causal"]

FORMAT = 3
NEEDED = ("config.json", "tokenizer.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Origin:
    """Where an export comes from and how it attends.

    Attributes:
        run: Name of the run that made it; the folder's name where no ul2r.json says more.
        attention: "prefix" where inputs were seen in both directions in training, else "causal".
        denoising: Whether it was trained on denoisers, and so knows modes and sentinels.
        vocabulary: Eos, modes and sentinels; None in a folder without ul2r.json.
        role: The run's place in a comparison.
        step: Optimizer steps of the run.
        tokens: Training tokens, those of the parent runs included.
        flops: Training FLOPs, those of the parent runs included.
    """

    run: str
    attention: Attention = "causal"
    denoising: bool = False
    vocabulary: Vocabulary | None = None
    role: str | None = None
    step: int | None = None
    tokens: int | None = None
    flops: float | None = None


def read_origin(folder: Path) -> Origin:
    """Check that a folder is a complete export and read its ul2r.json.

    Any other Hugging Face causal language model has no such file; it is served causally.

    Raises:
        CheckpointError: If a file is missing, or ul2r.json is not of the known format.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no export at {folder}: the folder does not exist")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    if missing:
        raise CheckpointError(
            f"{folder} is not an export: it lacks {', '.join(missing)}; point to a folder that jobs/export.py wrote"
        )
    file = folder / "ul2r.json"
    if not file.is_file():
        return Origin(run=folder.resolve().name)
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}): export the run again"
        ) from error


def _parse(fields: Mapping[str, Any]) -> Origin:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version reads {FORMAT}")
    if fields["attention"] not in get_args(Attention):
        raise ValueError(f"attention {fields['attention']!r} is neither prefix nor causal")
    return Origin(
        run=fields["run"],
        attention=fields["attention"],
        denoising=fields["denoising"],
        vocabulary=Vocabulary.from_dict(fields["vocabulary"]),
        role=fields["role"],
        step=fields["step"],
        tokens=fields["tokens"],
        flops=fields["flops"],
    )
