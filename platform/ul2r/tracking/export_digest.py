"""Digest of an export, by which a registered version and stored scores name it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ul2r.errors import CheckpointError
from ul2r.filesystem import sha256_of
from ul2r.paths import EXPORT_METADATA_FILE


def hash_export(folder: Path) -> str:
    """Return the SHA-256, in hexadecimal, over the digests of an export's weights and metadata.

    Raises:
        CheckpointError: If `folder` is not an export.
    """
    weights = sorted(folder.glob("*.safetensors"))
    metadata = folder / EXPORT_METADATA_FILE
    if not weights or not metadata.is_file():
        raise CheckpointError(
            f"{folder} is not an export (no *.safetensors with {EXPORT_METADATA_FILE}): run `ul2r export RECIPE` first"
        )

    # Of the content alone: a copy of the export elsewhere has the same digest. `*.safetensors` are in order of names.
    combined = hashlib.sha256()
    for path in (*weights, metadata):
        combined.update(bytes.fromhex(sha256_of(path)))
    return combined.hexdigest()
