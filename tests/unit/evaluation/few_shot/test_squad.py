"""SQuAD 2.0 item by item: the mean of the items is the metric of all of them together."""

from __future__ import annotations

from typing import Any

import pytest

from ul2r.evaluation.few_shot.items import collect_rows
from ul2r.evaluation.few_shot.squad import score_best_f1
from ul2r.evaluation.few_shot.suites import SuiteTask


def pair(text: str, answers: list[str], probability: float) -> Any:  # noqa: ANN401  as lm_eval has it
    return (
        {"prediction_text": text, "no_answer_probability": probability},
        {"answers": {"text": answers}},
    )


ITEMS = [
    pair("The Eiffel Tower!", ["Eiffel tower", "tower"], 0.1),  # answered: 1
    pair("a red car", ["blue car"], 0.2),  # 2 words against 2, one of them in common: 1/2
    pair("Paris", [], 0.5),  # declined: 1
    pair("Rome", [], 0.9),  # declined: 1
    pair("tower", ["tower"], 0.95),  # declined although it is known: 0
]


def test_items_have_the_scores_of_the_best_threshold() -> None:
    assert score_best_f1(ITEMS) == [100, 50, 100, 100, 0]


def test_no_threshold_gives_a_better_mean() -> None:
    means = []
    for threshold in (-1.0, *(p["no_answer_probability"] for p, _ in ITEMS)):
        # Each item alone is answered or declined, whatever the others are.
        total = 0.0
        for prediction, reference in ITEMS:
            known = bool(reference["answers"]["text"])
            if prediction["no_answer_probability"] > threshold:
                total += not known
            elif known:
                total += score_best_f1([(prediction, reference)])[0] / 100
        means.append(total)
    assert sum(score_best_f1(ITEMS)) / 100 == pytest.approx(max(means))


def test_squad_has_a_row_for_each_item() -> None:
    entry = SuiteTask(name="squadv2", folder="squadv2", metric="best_f1", scale=0.01)
    samples = [
        {
            "metrics": ["best_f1", "f1"],
            "best_f1": item,
            "f1": item,
            "doc_id": number,
            "prompt_hash": str(number),
            "filter": "none",
            "target": "t",
            "filtered_resps": ["r"],
        }
        for number, item in enumerate(ITEMS)
    ]
    rows = collect_rows(entry, "squadv2", 1, samples)
    assert [row["value"] for row in rows if row["is_headline"]] == [1, 0.5, 1, 1, 0]
    assert {row["metric"] for row in rows} == {"best_f1"}
