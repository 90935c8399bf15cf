"""Scores of guessing."""

from __future__ import annotations

import json

import pytest

from ul2r.evaluation.few_shot.chance import find_chance


def row(line: str, answer: object, metric: str = "acc") -> dict[str, object]:
    return {"line": line, "metric": metric, "is_headline": True, "answer": json.dumps(answer)}


def test_chance_by_number_of_answers() -> None:
    pair = [-1.0, False]
    rows = [
        row("mixed", [pair, pair]),
        row("mixed", [pair, pair, pair, pair]),
        row("lambada", [pair]),
        row("gsm8k", ["42"], "exact_match"),
        row("squad", ["a", "b"], "f1"),
        {**row("mixed", [pair] * 9), "is_headline": False},
    ]

    assert find_chance(rows) == {
        "mixed": pytest.approx((1 / 2 + 1 / 4) / 2),
        "lambada": 0.0,
        "gsm8k": 0.0,
        "squad": None,
    }
