"""What a token store is, written beside it: how it was made, what its tokens mean, and digests of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ul2r.errors import CorpusError
from ul2r.objective.vocabulary import Vocabulary

MANIFEST_FILE = "manifest.json"
STORE_FILES = ("tokenizer.json", "train.bin", "train.idx", "held_out.bin", "held_out.idx")
FORMAT = 2
ORDER = "data.order"
"""Stands among the inputs of a streamed store."""


@dataclass(frozen=True)
class Split:
    """Counts of one side of the held-out split."""

    documents: int
    tokens: int
    """With one eos for each document."""
    text_bytes: int
    """UTF-8 bytes of the text; 0 for documents that came as tokens."""


@dataclass(frozen=True)
class Segment:
    """A part of a streamed store, read before those behind it."""

    shards: int
    """Shards that it was joined from."""
    tokens: int
    """To train on; without any it has no files."""


@dataclass(frozen=True)
class Manifest:
    """A token store's description.

    `inputs` are the settings and files it was made from: the same inputs need no second run.
    """

    inputs: Mapping[str, Any]
    vocabulary: Vocabulary
    train: Split
    held_out: Split
    files: Mapping[str, str]
    """SHA-256 of each file of the store, by name."""
    chapters: tuple[Segment, ...] = ()
    """Of a streamed store (see `data/store/segments.py`), those that are made."""
    complete: bool = True
    """Whether nothing is missing; only a streamed store can be read before."""
    mistake: str = ""
    """Why the rest of a streamed store cannot be made, for those who wait for it."""

    @property
    def tokenizer(self) -> str:
        """SHA-256 of tokenizer.json."""
        return self.files["tokenizer.json"]

    @property
    def fingerprint(self) -> str:
        """A digest of all tokens and of what they mean; equal stores have equal ones.

        A streamed store, which is known by its fingerprint before it is complete, has that of its inputs instead.
        """
        identity = self.inputs if ORDER in self.inputs else self.files
        return hashlib.sha256(json.dumps(dict(sorted(identity.items()))).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json, whole or not at all."""
        tree = {
            "format": FORMAT,
            "inputs": dict(self.inputs),
            "vocabulary": self.vocabulary.to_dict(),
            "train": asdict(self.train),
            "held_out": asdict(self.held_out),
            "files": dict(self.files),
            "chapters": [asdict(chapter) for chapter in self.chapters],
            "complete": self.complete,
            "mistake": self.mistake,
        }
        beside = folder / f"{MANIFEST_FILE}.part"
        beside.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        beside.replace(folder / MANIFEST_FILE)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json.

        Raises:
            CorpusError: If there is none, or it is not one that this version writes.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            if folder.exists():
                raise CorpusError(
                    f"{folder}: is in the way of a token store, but is none (no {MANIFEST_FILE}): "
                    "delete it, then run jobs/prepare.py RECIPE"
                )
            raise CorpusError(f"{folder}: no token store here: run jobs/prepare.py RECIPE first")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise CorpusError(f"{path}: format {tree['format']}, this version reads {FORMAT}")
            return cls(
                inputs=tree["inputs"],
                vocabulary=Vocabulary.from_dict(tree["vocabulary"]),
                train=Split(**tree["train"]),
                held_out=Split(**tree["held_out"]),
                files=tree["files"],
                chapters=tuple(Segment(**chapter) for chapter in tree.get("chapters", ())),
                complete=tree.get("complete", True),
                mistake=tree.get("mistake", ""),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{path}: damaged ({type(error).__name__}: {error}); delete {folder} and prepare it again"
            ) from None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
