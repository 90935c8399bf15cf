"""Pairs of prompt and answer next to a tiny token store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ul2r.config import Recipe
from ul2r.data.store.pair_store import PairStore
from ul2r.testing.recipes import tiny_recipe


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


def make_pairs(count: int) -> list[dict[str, str]]:
    """Return records of short pairs with a prompt each."""
    return [{"prompt": f"Question {i}?", "answer": f"It is {i * i}."} for i in range(count)]


def pair_recipe(storage: Path, *entries: Path, **data: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """Return a `tiny_recipe` that trains on the pairs of files; `data` are more settings of its data."""
    return tiny_recipe(
        storage,
        data={"num_sentinels": 64, "pairs": list(map(str, entries)), **data},
        objective={"mixture": [{"kind": "pairs", "weight": 1}]},
    )


def read_pair_texts(store: PairStore, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return prompts and answers of a store as text, with special tokens."""
    found = []
    for number, length in enumerate(store.prompt_lengths.tolist()):
        prompt, answer = np.split(store.read(number), [length])
        found.append(
            (
                tokenizer.decode(prompt.tolist(), skip_special_tokens=False),
                tokenizer.decode(answer.tolist(), skip_special_tokens=False),
            )
        )
    return found
