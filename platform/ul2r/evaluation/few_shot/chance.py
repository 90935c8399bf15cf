"""Scores of guessing on few-shot tasks, from the number of answers that each item offers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

GUESSED = frozenset({"acc", "acc_norm"})
"""Headline metrics whose score of guessing is the inverse of the number of answers."""


def find_chance(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the score of guessing by line of a suite, None where it is not known.

    An item of multiple choice has a log-probability for each answer; one with a single answer, which the model has to
    find by itself, has no chance. Scores such as F1 have some by accident, which is not known.

    Args:
        rows: Rows of items.parquet.
    """
    by_line: dict[str, list[float | None]] = {}
    for row in rows:
        if row["is_headline"]:
            by_line.setdefault(row["line"], []).append(_chance_of(row))
    return {
        line: None if None in chances else float(np.mean(np.asarray(chances, float)))
        for line, chances in by_line.items()
    }


def _chance_of(row: Mapping[str, Any]) -> float | None:
    if row["metric"] == "exact_match":
        return 0.0
    if row["metric"] not in GUESSED:
        return None
    answers = json.loads(row["answer"])
    # Pairs of log-probability and greediness: lm-eval's form of answers that are ranked.
    is_ranked = len(answers) > 1 and all(isinstance(answer, list) for answer in answers)
    return 1 / len(answers) if is_ranked else 0.0
