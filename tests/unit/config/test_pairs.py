"""Recipes with pairs of prompt and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ul2r.config import Recipe
from ul2r.config.validation_errors import explain
from ul2r.testing.recipes import tiny_recipe

PAIRS = {"kind": "pairs", "weight": 1}


def recipe(**changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    return tiny_recipe(Path("runs"), **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"objective": {"mixture": [PAIRS]}},
            "objective.mixture has a denoiser of kind=pairs, but data.pairs names no file: set data.pairs to .jsonl",
        ),
        (
            {"evaluation": {"mixture": [PAIRS]}},
            "evaluation.mixture has a denoiser of kind=pairs, but data.pairs names no file",
        ),
        (
            {
                "data": {"pairs": ["p.jsonl"]},
                "objective": {"mixture": [PAIRS, {**PAIRS, "name": "more"}]},
            },
            "objective.mixture: has several denoisers of kind=pairs: list one, with their whole weight",
        ),
        (
            {
                "data": {"pairs": ["p.jsonl"]},
                "objective": {"mixture": [{"kind": "prefix", "weight": 1e6}, PAIRS]},
            },
            "objective: mixture: weight=1 of 'pairs' gives pairs no row of 10,000: bring the weights closer",
        ),
        (
            {
                "data": {"pairs": ["p.jsonl"]},
                "evaluation": {"mixture": [{"kind": "prefix", "name": "pairs", "weight": 1}]},
            },
            "evaluation.mixture needs a different name for each denoiser, that of pairs included; got ['pairs',",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    assert explain(caught.value, Recipe).startswith(expected)


def test_pairs_are_measured_whether_they_are_trained_on_or_not() -> None:
    data = {"pairs": ["p.jsonl"]}
    trained = recipe(data=data, objective={"mixture": [{**PAIRS, "weight": 7}]})
    measured = recipe(data=data)
    assert trained.evaluation == measured.evaluation
    assert [denoiser.name for denoiser in measured.evaluation.mixture] == [
        *(denoiser.name for denoiser in recipe().evaluation.mixture),
        "pairs",
    ]
    # A recipe that was written out and read again is the same.
    assert Recipe.model_validate(trained.model_dump(mode="json")) == trained
