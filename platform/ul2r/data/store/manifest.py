"""The description of a token store, in its folder: its inputs, its vocabulary, and digests of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ul2r.errors import CorpusError
from ul2r.filesystem import write_atomically
from ul2r.objective.vocabulary import Vocabulary
from ul2r.paths import TOKENIZER_FILE, is_file_name

MANIFEST_FILE = "manifest.json"
STORE_FILES = (TOKENIZER_FILE, "train.bin", "train.idx", "held_out.bin", "held_out.idx")
FORMAT = 2
ORDER_KEY = "data.order"
"""Input that only streamed stores have."""
BLEND_KEY = "data.blend"
"""Input that only blends have: the stores that they name."""


@dataclass(frozen=True)
class SplitCounts:
    """Size of one side of the held-out split.

    Attributes:
        num_documents: Documents.
        num_tokens: Tokens, one eos per document included.
        text_bytes: UTF-8 bytes of the text; 0 for documents that were given as tokens.
    """

    num_documents: int
    num_tokens: int
    text_bytes: int

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(
            self.num_documents + other.num_documents,
            self.num_tokens + other.num_tokens,
            self.text_bytes + other.text_bytes,
        )

    def to_dict(self) -> dict[str, int]:
        """Return the counts as they are written to the manifest."""
        return {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "text_bytes": self.text_bytes,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, int]) -> SplitCounts:
        """Read what `to_dict` wrote."""
        return cls(tree["documents"], tree["tokens"], tree["text_bytes"])


@dataclass(frozen=True)
class Segment:
    """A part of a streamed store, read before the parts after it.

    Attributes:
        num_shards: Shards that were merged into it.
        num_tokens: Training tokens; a segment with none has no files.
    """

    num_shards: int
    num_tokens: int

    def to_dict(self) -> dict[str, int]:
        """Return the segment as it is written to the manifest."""
        return {"shards": self.num_shards, "tokens": self.num_tokens}

    @classmethod
    def from_dict(cls, tree: Mapping[str, int]) -> Segment:
        """Read what `to_dict` wrote."""
        return cls(tree["shards"], tree["tokens"])


@dataclass(frozen=True)
class Manifest:
    """Description of a token store.

    Attributes:
        inputs: Settings and files that the store was made from: the same inputs need no second run.
        vocabulary: Meaning of the token ids.
        train: Size of the training split.
        held_out: Size of the held-out split.
        files: SHA-256 of each file of the store, by name.
        segments: Finished segments of a streamed store (see `data/store/segments.py`).
        is_complete: False while segments are missing; only a streamed store can be read before it is complete.
        error: Reason why a streamed store cannot be finished, for the processes that wait for more of it.
        left_out: Counts of files and documents that are not in the store, by reason (see `data/prepare/left_out.py`).
        round_trip: Text that the tokenizer loses, if it is a given one (see `data/prepare/round_trip.py`).
    """

    inputs: Mapping[str, Any]
    vocabulary: Vocabulary
    train: SplitCounts
    held_out: SplitCounts
    files: Mapping[str, str]
    segments: tuple[Segment, ...] = ()
    is_complete: bool = True
    error: str = ""
    left_out: Mapping[str, Any] = field(default_factory=dict)
    round_trip: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> str:
        """SHA-256 of tokenizer.json."""
        return self.files[TOKENIZER_FILE]

    @property
    def fingerprint(self) -> str:
        """Digest of all tokens and their meaning; equal stores have equal fingerprints.

        A streamed store is identified before it is complete, so its fingerprint is a digest of its inputs instead.
        """
        # Checkpoints store this digest: with any other serialization, runs would refuse to resume on their own store.
        identity = self.inputs if ORDER_KEY in self.inputs else self.files
        return hashlib.sha256(json.dumps(dict(sorted(identity.items()))).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json atomically."""
        # The keys are the file format: they stay as they were first written, whatever the attributes are called.
        tree: dict[str, Any] = {
            "format": FORMAT,
            "inputs": dict(self.inputs),
            "vocabulary": self.vocabulary.to_dict(),
            "train": self.train.to_dict(),
            "held_out": self.held_out.to_dict(),
            "files": dict(self.files),
            "chapters": [segment.to_dict() for segment in self.segments],
            "complete": self.is_complete,
            "mistake": self.error,
        }
        # Only where there is something to say: a store's manifest is else as it always was.
        if self.left_out:
            tree["left_out"] = dict(self.left_out)
        if self.round_trip:
            tree["round_trip"] = dict(self.round_trip)
        write_atomically(folder / MANIFEST_FILE, json.dumps(tree, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, store: str | None = None) -> Manifest:
        """Read `folder`/manifest.json.

        Args:
            folder: Folder of the store, or of its manifest alone.
            store: URL that the manifest was downloaded from, for messages; None for a local store.

        Raises:
            CorpusError: If there is none, or this version cannot read it.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            if folder.exists():
                raise CorpusError(
                    f"{folder}: not a token store (no {MANIFEST_FILE}): "
                    "delete this folder, then run `ul2r prepare RECIPE`"
                )
            raise CorpusError(f"{folder}: no token store: run `ul2r prepare RECIPE` first")

        place = store.rstrip("/") if store else folder
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise CorpusError(
                    f"{place}/{MANIFEST_FILE}: has format {tree['format']}, this version reads format {FORMAT}: "
                    f"delete {place} and run `ul2r prepare RECIPE`"
                )
            # The defaults are for manifests from before these keys existed.
            return cls(
                inputs=dict(tree["inputs"]),
                vocabulary=Vocabulary.from_dict(tree["vocabulary"]),
                train=SplitCounts.from_dict(tree["train"]),
                held_out=SplitCounts.from_dict(tree["held_out"]),
                files=_check_files(tree["files"], is_blend=BLEND_KEY in tree["inputs"]),
                segments=tuple(map(Segment.from_dict, tree.get("chapters", ()))),
                is_complete=tree.get("complete", True),
                error=tree.get("mistake", ""),
                left_out=tree.get("left_out", {}),
                round_trip=tree.get("round_trip", {}),
            )
        # JSON that was edited or truncated can have any shape: each of these means that it is damaged.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f"{place}/{MANIFEST_FILE}: damaged ({type(error).__name__}: {error}): "
                f"delete {place} and prepare it again"
            ) from None


def _check_files(files: Mapping[str, str], *, is_blend: bool) -> dict[str, str]:
    """Return the digests by name; refuse names that are not those of files in the store's own folder.

    Raises:
        ValueError: With the name.
        KeyError: If there is no tokenizer.
    """
    # A downloaded manifest must not choose where its files are written. The members of a blend are no files.
    names = [] if is_blend else list(files)
    for name in names:
        if not is_file_name(name):
            raise ValueError(f"files has {name!r}, which is not the name of a file in the store")
    if TOKENIZER_FILE not in files:
        raise KeyError(f"files.{TOKENIZER_FILE}")
    return dict(files)
