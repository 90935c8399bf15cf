"""Evaluation of a Hugging Face model as it is, on the rows of the runs that continue it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ul2r.filesystem import sha256_of
from ul2r.paths import RunPaths, StoragePaths

MAX_NAME = 64
DIGEST_CHARACTERS = 8


@dataclass(frozen=True)
class PretrainedArm:
    """A model in a comparison that is no run.

    Attributes:
        name: For tables and records: what the model is called, in characters of a run's name.
        model_folder: Folder with the model's weights.
        storage: Storage of the runs that it is compared with.
    """

    name: str
    model_folder: Path
    storage: Path

    @classmethod
    def from_folder(cls, hf: str, model_folder: Path, storage: Path) -> PretrainedArm:
        """Describe the model of a folder.

        Args:
            hf: Its folder or its name on the Hub, as the user wrote it.
            model_folder: The local folder.
            storage: Storage of the runs.
        """
        # The folder of a Hub model is named by its commit.
        last = Path(hf).expanduser().absolute().name or "model"
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-") or "model"
        return cls(name[:MAX_NAME], model_folder, storage)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, over the digests of config.json and weights: scores are of these alone."""
        combined = hashlib.sha256()
        files = sorted(self.model_folder.glob("*.safetensors"))
        for path in (*files, self.model_folder / "config.json"):
            combined.update(bytes.fromhex(sha256_of(path)))
        return combined.hexdigest()

    @property
    def paths(self) -> RunPaths:
        """Files on the model in the storage: scores and the record of its run, no copy of it."""
        folder = StoragePaths(self.storage).bases / f"{self.name}-{self.digest[:DIGEST_CHARACTERS]}"
        return RunPaths(folder)
