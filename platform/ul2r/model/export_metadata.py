"""Description of an export: the content of its ul2r.json. Imports neither torch nor Megatron-Core.

{"format": 3, "vocabulary": {...}, "run": "tiny", "role": "ul2r", "attention": "prefix", "denoising": true,
 "eos_after_inputs": false, "prefix_sentinel": false, "fim": false, "step": 300, "tokens": 1228800,
 "flops": 1.2e+15, "checkpoint": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ul2r.errors import CheckpointError
from ul2r.filesystem import suggest_path, write_atomically
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import EXPORT_METADATA_FILE, TOKENIZER_FILE

Attention = Literal["prefix", "causal"]

FORMAT = 3
"""Version of ul2r.json that is written and read."""
REQUIRED_FILES = ("config.json", TOKENIZER_FILE)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""An export holds one of these: all weights in one file, or an index of several."""

PARSING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, AssertionError)
"""Errors raised by parsing a damaged or edited ul2r.json, including the assertions of `Vocabulary`."""


@dataclass(frozen=True)
class ExportMetadata:
    """Origin of an export and how it attends.

    Attributes:
        run: Name of the run that wrote it; the folder's name if there is no ul2r.json.
        role: The run's role in a comparison.
        attention: "prefix" if inputs attended in both directions during training, else "causal".
        denoising: True if trained on denoisers, so that the model knows modes and sentinels.
        eos_after_inputs: True if an eos closes the inputs, as well as the targets.
        prefix_sentinel: True if a sentinel closes the inputs of S2S and begins its targets.
        fim: True if trained on fill-in-the-middle, so that the model knows its layout of sentinels.
        step: Optimizer steps of the run.
        tokens: Row positions trained on, including parent runs.
        flops: Training FLOPs, including parent runs.
        checkpoint: Identity of the exported checkpoint.
        vocabulary: Eos, modes and sentinels; None for a folder without ul2r.json.
        data: Text that the weights were trained on, as plain JSON values of `ul2r.data.sampling.order.DataUse`, oldest
            first; None if it is not recorded.
    """

    run: str
    role: str | None = None
    attention: Attention = "causal"
    denoising: bool = False
    eos_after_inputs: bool = False
    prefix_sentinel: bool = False
    fim: bool = False
    step: int | None = None
    tokens: int | None = None
    flops: float | None = None
    checkpoint: str | None = None
    vocabulary: Vocabulary | None = None
    data: list[dict[str, Any]] | None = None

    def write(self, folder: Path) -> None:
        """Write ul2r.json into an export's folder."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / EXPORT_METADATA_FILE, text)

    def is_written_in(self, folder: Path) -> bool:
        """Return whether a folder's ul2r.json has this content."""
        file = folder / EXPORT_METADATA_FILE
        try:
            # Parsed, since a file of an older version lacks fields that then have their defaults.
            return self == self.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, *PARSING_ERRORS):
            return False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back."""
        assert self.vocabulary is not None
        fields = dict(vars(self))
        vocabulary = fields.pop("vocabulary").to_dict()
        # Left out, so that an export of a version without it is not written again.
        if self.data is None:
            del fields["data"]
        return {"format": FORMAT, "vocabulary": vocabulary, **fields}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Parse the content of a ul2r.json.

        Raises:
            KeyError: If a field is missing.
            ValueError: If the format or a value is unknown.
        """
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']!r}, this version reads {FORMAT}")
        if tree["attention"] not in get_args(Attention):
            raise ValueError(f"attention {tree['attention']!r} is neither prefix nor causal")
        return cls(
            run=tree["run"],
            role=tree["role"],
            attention=tree["attention"],
            denoising=tree["denoising"],
            # Not recorded before they could be served: False, as those exports were served.
            eos_after_inputs=tree.get("eos_after_inputs", False),
            prefix_sentinel=tree.get("prefix_sentinel", False),
            fim=tree.get("fim", False),
            step=tree["step"],
            tokens=tree["tokens"],
            flops=tree["flops"],
            checkpoint=tree.get("checkpoint"),
            vocabulary=Vocabulary.from_dict(tree["vocabulary"]),
            data=tree.get("data"),
        )


def read_export_metadata(folder: Path) -> ExportMetadata:
    """Check that a folder is a complete export and read its ul2r.json.

    Any other Hugging Face causal language model has no such file and is served causally.

    Raises:
        CheckpointError: If a file is missing, or ul2r.json has an unknown format.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no export at {folder}: the folder does not exist{suggest_path(folder)}"
        )
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        missing.append(WEIGHT_FILES[0])
    if missing:
        raise CheckpointError(
            f"{folder} is not an export: it lacks {', '.join(missing)}; point to a folder that `ul2r export` wrote"
        )

    file = folder / EXPORT_METADATA_FILE
    if not file.is_file():
        # Resolved, since the path "." has no name.
        return ExportMetadata(run=folder.resolve().name)
    try:
        return ExportMetadata.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except PARSING_ERRORS as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}): export the run again"
        ) from error
