"""Scores of a model's gaps on disk.

RUN/gaps/
  items.parquet    a row for each gap and reading
  result.json      means, settings, and the digests that they are valid for
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ul2r.evaluation.gaps.items import read_items, write_items
from ul2r.evaluation.gaps.scores import GapScores
from ul2r.filesystem import write_atomically

ITEMS_FILE = "items.parquet"
RESULT_FILE = "result.json"
FORMAT = 1
"""Raised when the meaning of scores or these files' fields change, so that older ones are measured again."""


@dataclass(frozen=True)
class GapConditions:
    """Everything that the scores depend on, except the code.

    Attributes:
        model: Digest of the weights.
        readings: What the model sees of the texts.
        token_store: Fingerprint of the token store.
        settings: `evaluation.gaps` as plain JSON values.
        max_length: Tokens of a row of training.
    """

    model: str
    readings: Sequence[str]
    token_store: str
    settings: dict[str, Any]
    max_length: int


def save_gaps(
    folder: Path,
    measured: Sequence[GapScores],
    conditions: GapConditions,
    left_out: Sequence[str],
) -> None:
    """Write both files."""
    # Without result.json, which is written last, half-written scores are none.
    (folder / RESULT_FILE).unlink(missing_ok=True)
    write_items(folder / ITEMS_FILE, measured)
    tree = {
        "format": FORMAT,
        **_as_plain(conditions),
        "left_out": list(left_out),
        "scores": {
            f"{scores.name}/{scores.reading}": {
                metric: asdict(score) for metric, score in scores.summarize().items()
            }
            for scores in measured
        },
    }
    write_atomically(folder / RESULT_FILE, json.dumps(tree, indent=2) + "\n")


def load_gaps(folder: Path, conditions: GapConditions) -> list[GapScores] | None:
    """Return the scores in a folder, or None if there are none of these very conditions."""
    tree = _read_result(folder)
    wanted = {"format": FORMAT, **_as_plain(conditions)}
    if tree is None or any(tree.get(key) != value for key, value in wanted.items()):
        return None
    return read_items(folder / ITEMS_FILE)


def load_gaps_of(folder: Path, model: str, token_store: str) -> list[GapScores] | None:
    """Return the scores in a folder, whatever their settings, or None if they are of other weights or another text.

    Args:
        folder: The folder.
        model: Digest of the weights.
        token_store: Fingerprint of the token store.
    """
    tree = _read_result(folder)
    wanted = {"format": FORMAT, "model": model, "token_store": token_store}
    if tree is None or any(tree.get(key) != value for key, value in wanted.items()):
        return None
    return read_items(folder / ITEMS_FILE)


def _read_result(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT_FILE
    if not (path.is_file() and (folder / ITEMS_FILE).is_file()):
        return None
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


def _as_plain(conditions: GapConditions) -> dict[str, Any]:
    # As read back from JSON, which has no tuples.
    tree: dict[str, Any] = json.loads(json.dumps(asdict(conditions)))
    return tree
