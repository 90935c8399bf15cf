"""Disk space that runs and their token store will take in their storage, compared with what is free.

Only the storage is looked at: neither `checkpoints.remote_dir` nor fetched stores of a blend, and no quota of a user's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ul2r.config import Recipe
from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.inputs import list_data
from ul2r.data.prepare.source_files import list_corpus
from ul2r.data.prepare.token_estimate import count_text_bytes, estimate_tokens
from ul2r.data.store.segments import WORK_PREFIX
from ul2r.data.store.token_store import UINT16_VOCABULARY
from ul2r.data.tokenizer import load_tokenizer
from ul2r.errors import RecipeError
from ul2r.model.file_sizes import estimate_files, format_size

TOKENS_PER_BYTE = 0.25
"""Of a tokenizer that is still to be trained: fewer than it will have, so that text is not refused for an estimate."""
STORE_COPIES = 2
"""Shards and the store that they are merged into, until the merge is done."""


def check_run_space(recipe: Recipe, vocabulary_size: int, free: int | None = None) -> None:
    """Check that a run's checkpoints and its export fit its storage.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.
        free: Free bytes; by default those of the storage's file system.

    Raises:
        RecipeError: If they do not.
    """
    files = estimate_files(recipe, vocabulary_size)
    _check(
        recipe.storage,
        files.total - count_run_bytes(recipe),
        f"run {recipe.name!r} takes {files.describe()}",
        "lower checkpoints.keep",
        free,
    )


def check_store_space(recipe: Recipe, vocabulary_size: int, free: int | None = None) -> None:
    """Check that the token store that is to be made of a recipe's text fits its storage.

    Args:
        recipe: The run.
        vocabulary_size: Entries of the tokenizer.
        free: Free bytes; by default those of the storage's file system.

    Raises:
        CorpusError: If the text cannot be read.
        RecipeError: If it does not fit.
    """
    needed = estimate_store_bytes(recipe, vocabulary_size)
    _check(
        recipe.storage,
        needed - count_store_bytes(recipe),
        f"making the token store takes about {format_size(needed)}",
        "give less text",
        free,
    )


def check_family_space(
    recipes: Sequence[Recipe], vocabulary_size: int, *, with_store: bool, free: int | None = None
) -> None:
    """Check that several runs of a storage fit it, and their token store.

    Args:
        recipes: The runs, of which the first makes the store.
        vocabulary_size: Entries of the tokenizer.
        with_store: Whether the store is still to be made.
        free: Free bytes; by default those of the storage's file system.

    Raises:
        CorpusError: If the text cannot be read.
        RecipeError: If they do not fit.
    """
    needed = 0
    parts = []
    for recipe in recipes:
        files = estimate_files(recipe, vocabulary_size)
        # One after the other: only the last has more than what it keeps.
        total = files.total if recipe is recipes[-1] else files.bytes_at_end
        needed += max(total - count_run_bytes(recipe), 0)
        parts.append(f"run {recipe.name!r} takes {files.describe()}")
    if with_store:
        store = estimate_store_bytes(recipes[0], vocabulary_size)
        # The shards are gone before training begins.
        needed += max(store // STORE_COPIES - count_store_bytes(recipes[0]), 0)
        parts.append(f"the token store about {format_size(store // STORE_COPIES)}")
    _check(recipes[0].storage, needed, "; ".join(parts), "lower checkpoints.keep", free)


def estimate_store_bytes(recipe: Recipe, vocabulary_size: int) -> int:
    """Estimate the bytes that making a recipe's token store and pairs takes; a blend only lists other stores."""
    data = recipe.data
    if data.blend:
        return 0
    files = list_data(data).files
    texts = [file for file in files if not file.holds_tokens]
    if data.tokenizer is None:
        num_tokens = int(TOKENS_PER_BYTE * count_text_bytes(texts))
    else:
        num_tokens = estimate_tokens(texts, DocumentTokenizer(load_tokenizer(data.tokenizer)))
    token_bytes = 2 if vocabulary_size < UINT16_VOCABULARY else 4
    # Token stores are copied as they are.
    copied = sum(file.size for file in files if file.holds_tokens)
    # Pairs are made like the store, and are small next to it.
    pairs = list_corpus(data.pairs, setting="data.pairs").files
    num_tokens += int(TOKENS_PER_BYTE * sum(file.size for file in pairs))
    return STORE_COPIES * (num_tokens * token_bytes + copied)


def count_run_bytes(recipe: Recipe) -> int:
    """Return the bytes of a run's checkpoints and export that exist; unfinished ones will be removed."""
    return _count_bytes(recipe.paths.checkpoints) + _count_bytes(recipe.paths.export)


def count_store_bytes(recipe: Recipe) -> int:
    """Return the bytes of what exists of a token store: its segments, and shards that are finished."""
    # Work folders of other text will be removed.
    work_folders = recipe.storage.glob(f"{WORK_PREFIX}*")
    return sum(_count_bytes(folder) for folder in (recipe.storage_paths.store, *work_folders))


def find_free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that a path is on, or would be once it exists."""
    # Not Path.exists, which raises for a folder that may not be looked into.
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # noqa: PTH110  Path.exists raises there
    return shutil.disk_usage(existing).free


def _count_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            # Another process may remove old checkpoints meanwhile.
            except FileNotFoundError:
                continue
    return total


def _check(storage: Path, needed: int, reason: str, remedy: str, free: int | None) -> None:
    """Refuse what needs more bytes than are free.

    Raises:
        RecipeError: If it does.
    """
    available = find_free_bytes(storage) if free is None else free
    if needed > available:
        raise RecipeError(
            f"storage={storage}: {format_size(available)} are free, {format_size(needed)} more are needed: {reason}: "
            f"free disk space, set storage to another disk, or {remedy}"
        )
