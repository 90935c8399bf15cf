"""Scores of single gaps on disk, so that models can be compared gap by gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ul2r.evaluation.gaps.scores import GapAnswers, GapScores
from ul2r.evaluation.gaps.selection import ORIGINS
from ul2r.filesystem import staged_file

SCHEMA = pa.schema(
    [
        ("length", pa.int64()),  # tokens of a gap
        ("slots", pa.int64()),  # gaps of the text
        ("reading", pa.string()),  # left, both or fim
        ("text", pa.int64()),  # number of the text in its group
        ("gap", pa.int64()),  # number of the gap in its text
        ("text_hash", pa.string()),  # SHA-256 of the text and the places of its gaps
        ("losses", pa.list_(pa.float64())),  # nats of each token of the gap
        ("is_most_likely", pa.list_(pa.bool_())),
        ("origins", pa.list_(pa.string())),  # sides on which each token occurs
        ("target", pa.string()),
        ("answer", pa.string()),  # null if no gaps were written
        ("is_exact", pa.bool_()),
        ("edit_similarity", pa.float64()),
    ]
)
"""Columns of items.parquet: a row for each gap and reading."""


def write_items(path: Path, measured: Sequence[GapScores]) -> None:
    """Write items.parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for scores in measured for row in _iter_rows(scores)]
    with staged_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def read_items(path: Path) -> list[GapScores]:
    """Read items.parquet: each group in each reading, in the order in which they were written."""
    rows: list[dict[str, Any]] = pq.read_table(path, schema=SCHEMA).to_pylist()
    groups = groupby(rows, lambda row: (row["length"], row["slots"], row["reading"]))
    return [_collect(list(group)) for _, group in groups]


def _iter_rows(scores: GapScores) -> Iterator[dict[str, Any]]:
    for text, text_hash in enumerate(scores.hashes):
        for gap in range(scores.slots):
            row = {
                "length": scores.length,
                "slots": scores.slots,
                "reading": scores.reading,
                "text": text,
                "gap": gap,
                "text_hash": text_hash,
                "losses": scores.losses[text, gap].tolist(),
                "is_most_likely": scores.is_most_likely[text, gap].tolist(),
                "origins": [ORIGINS[number] for number in scores.origins[text, gap]],
                "target": scores.targets[text][gap],
            }
            if scores.written is not None:
                row |= {
                    "answer": scores.written.answers[text][gap],
                    "is_exact": bool(scores.written.is_exact[text, gap]),
                    "edit_similarity": float(scores.written.edit_similarity[text, gap]),
                }
            yield row


def _collect(rows: Sequence[dict[str, Any]]) -> GapScores:
    """Return the scores of a group, whose rows are in the order of texts and gaps."""
    slots = rows[0]["slots"]
    shape = (len(rows) // slots, slots)

    def fold(column: str) -> np.ndarray[Any, np.dtype[Any]]:
        values = np.asarray([row[column] for row in rows])
        return values.reshape(*shape, *values.shape[1:])

    def fold_texts(column: str) -> tuple[tuple[str, ...], ...]:
        texts = [row[column] for row in rows]
        return tuple(tuple(texts[start : start + slots]) for start in range(0, len(texts), slots))

    origins = [[ORIGINS.index(origin) for origin in row["origins"]] for row in rows]
    written = None
    if rows[0]["answer"] is not None:
        written = GapAnswers(fold_texts("answer"), fold("is_exact"), fold("edit_similarity"))
    return GapScores(
        length=rows[0]["length"],
        slots=slots,
        reading=rows[0]["reading"],
        hashes=tuple(row["text_hash"] for row in rows[::slots]),
        origins=np.asarray(origins, np.int8).reshape(*shape, -1),
        losses=fold("losses"),
        is_most_likely=fold("is_most_likely"),
        targets=fold_texts("target"),
        written=written,
    )
