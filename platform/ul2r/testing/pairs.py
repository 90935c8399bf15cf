"""Pairs of prompt and answer next to a tiny token store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_pairs(path: Path, count: int = 200, *, first: int = 0) -> Path:
    """Write pairs of different lengths, numbered from `first`, as JSON Lines; return the path."""
    return write_json_lines(
        path,
        (
            {
                "prompt": f"How many apples has friend {number}?"
                + " Count the apples." * (number % 5),
                "answer": f"{number * 7} apples" + ", and the sea" * (number % 3) + ".",
            }
            for number in range(first, first + count)
        ),
    )


def write_json_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write any JSON values, one in each line; return the path."""
    lines = (json.dumps(record) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path
