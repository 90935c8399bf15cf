"""Answers to single items, kept so that arms can be compared item by item."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ul2r.evaluation.few_shot.squad import METRIC as BEST_F1
from ul2r.evaluation.few_shot.squad import score_best_f1
from ul2r.evaluation.few_shot.suites import SuiteTask
from ul2r.filesystem import staged_file

ITEMS_FILE = "items.parquet"
RESULT_FILE = "result.json"

SCHEMA = pa.schema(
    [
        ("line", pa.string()),  # line of the suite that the task belongs to
        ("task", pa.string()),
        ("seed", pa.int64()),  # of the few-shot examples
        ("item", pa.int64()),  # number in the task's split
        ("prompt_hash", pa.string()),  # SHA-256 of the context, examples included
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),
        ("is_headline", pa.bool_()),
        ("target", pa.string()),
        ("answer", pa.string()),  # what the model gave, as JSON
    ]
)
"""Columns of items.parquet: a row for each item, metric and seed."""


@dataclass(frozen=True)
class HeadlineItems:
    """Headline values of a task's items, pooled over seeds.

    Attributes:
        items: int64 (N,), their numbers, rising.
        values: float64 (N,), means over the seeds.
        prompts: Hashes of the contexts of each item, one for each seed.
    """

    items: np.ndarray[Any, np.dtype[np.int64]]
    values: np.ndarray[Any, np.dtype[np.float64]]
    prompts: tuple[tuple[str, ...], ...]


def collect_rows(
    entry: SuiteTask, task: str, seed: int, samples: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of a task's samples, as lm-evaluation-harness logs them.

    Metrics whose values are no numbers, but pairs that are only combined over all items, have no rows, except
    SQuAD's.
    """
    rows: list[dict[str, Any]] = []
    all_samples = list(samples)
    squad: Iterator[float] = iter(())
    if entry.metric == BEST_F1:
        squad = iter(score_best_f1([sample[BEST_F1] for sample in all_samples]))
    for sample in all_samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            if metric == entry.metric == BEST_F1:
                value = next(squad)
            if not isinstance(value, bool | int | float | np.number):
                continue
            rows.append(
                {
                    "line": entry.name,
                    "task": task,
                    "seed": seed,
                    "item": sample["doc_id"],
                    "prompt_hash": sample["prompt_hash"],
                    "metric": metric,
                    "filter": sample["filter"],
                    "value": float(value) * entry.scale,
                    "is_headline": metric == entry.metric and sample["filter"] == entry.filter,
                    "target": str(sample["target"]),
                    "answer": json.dumps(sample["filtered_resps"], ensure_ascii=False),
                }
            )
    return rows


def write_items(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write items.parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), temporary)


def read_items(path: Path) -> list[dict[str, Any]]:
    """Read items.parquet."""
    rows: list[dict[str, Any]] = pq.read_table(path, schema=SCHEMA).to_pylist()
    return rows


def merge_items(parts: Iterable[Path], path: Path) -> None:
    """Write items.parquet from the files of single tasks, one after the other."""
    with staged_file(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=SCHEMA))


def read_first_items(path: Path, count: int) -> list[dict[str, Any]]:
    """Read the first headline values of items.parquet, with their texts."""
    rows: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            rows += [row for row in batch.to_pylist() if row["is_headline"]]
            if len(rows) >= count:
                break
    return rows[:count]


def read_headlines(path: Path) -> list[dict[str, Any]]:
    """Read what `pool_headlines` takes of items.parquet, without texts."""
    columns = ["line", "task", "seed", "item", "prompt_hash", "value", "is_headline"]
    table = pq.read_table(
        path, schema=SCHEMA, columns=columns, filters=[("is_headline", "==", True)]
    )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def pool_headlines(rows: Iterable[Mapping[str, Any]]) -> dict[str, HeadlineItems]:
    """Return the headline values by line of the suite, in order; several tasks of one line are pooled."""
    by_line: dict[str, dict[tuple[str, int], list[tuple[int, float, str]]]] = {}
    for row in rows:
        if row["is_headline"]:
            items = by_line.setdefault(row["line"], {})
            # Tasks of one line have items of the same numbers.
            key = (row["task"], row["item"])
            items.setdefault(key, []).append((row["seed"], row["value"], row["prompt_hash"]))
    return {line: _pool(items) for line, items in by_line.items()}


def _pool(items: Mapping[tuple[str, int], list[tuple[int, float, str]]]) -> HeadlineItems:
    keys = sorted(items)
    return HeadlineItems(
        items=np.asarray([item for _, item in keys], np.int64),
        values=np.asarray([np.mean([value for _, value, _ in items[key]]) for key in keys]),
        prompts=tuple(tuple(prompt for _, _, prompt in sorted(items[key])) for key in keys),
    )
