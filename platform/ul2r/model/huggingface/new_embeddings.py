"""First values of embedding rows that a base does not have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ul2r.errors import CheckpointError
from ul2r.paths import TOKENIZER_FILE


def draw_rows(mean: Tensor, std: Tensor, seed: str, numbers: Iterable[int]) -> Tensor:
    """Draw rows that vary around the mean as the others do, each a function of the seed and its number.

    Args:
        mean: Of the other rows, (H,).
        std: Their standard deviation, (H,).
        seed: Of the run and the matrix.
        numbers: Of the N rows.

    Returns:
        (N, H), of the dtype of `mean`.
    """
    rows = []
    for number in numbers:
        digest = hashlib.sha256(f"{seed}/new row {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        noise = torch.randn(len(mean), generator=generator, dtype=torch.float32)
        rows.append(mean + std * noise.to(mean))
    return torch.stack(rows)


def list_rare_subwords(folder: Path) -> list[int]:
    """Return the ids of a folder's tokenizer's subwords, the rarest first.

    A BPE's subwords are in the order in which training found them, most frequent first; those of a unigram model are in
    the order of their probability.

    Raises:
        CheckpointError: If there is no tokenizer, or one without subwords.
    """
    file = folder / TOKENIZER_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        stored = tree["model"]["vocab"]
        added = {entry["id"] for entry in tree.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"training.new_embeddings=rare_subwords: {file} cannot be used ({error}): set it to mean_plus_noise or mean"
        ) from None
    # By text, or, in a unigram model, a list.
    ids = stored.values() if isinstance(stored, dict) else range(len(stored))
    rare = sorted(set(ids) - added, reverse=True)
    if not rare:
        raise CheckpointError(
            f"training.new_embeddings=rare_subwords: {file} has no subwords: set it to mean_plus_noise or mean"
        )
    return rare
