"""Texts written together."""

from __future__ import annotations

import pytest

from ul2r.config.few_shot import Prompting
from ul2r.evaluation.few_shot.prompting import PromptForm
from ul2r.evaluation.few_shot.writing import WritingLimits, write_continuations
from ul2r.inference import LanguageModel
from ul2r.testing.models import write_tiny_export

CONTEXTS = ["The sea", "def area(width,", "The sea was calm, and so was he.", "The sea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(write_tiny_export(tmp_path_factory.mktemp("writing") / "export"))


@pytest.mark.parametrize("settings", [{}, {"mode": "NLU"}, {"mode": "S2S", "attention": "causal"}])
def test_texts_written_together_are_those_written_one_by_one(
    model: LanguageModel, settings: dict[str, str]
) -> None:
    form = PromptForm(model, Prompting.model_validate(settings))
    requests = [
        (model.encode(context), WritingLimits(stop=("q",), max_tokens=4 + number))
        for number, context in enumerate(CONTEXTS)
    ]
    together = dict(write_continuations(model, form, requests))
    alone = [dict(write_continuations(model, form, [request]))[0] for request in requests]
    assert [together[index] for index in range(len(CONTEXTS))] == alone
    # The last has the first's context, with more room.
    assert alone[3].startswith(alone[0])
    assert len(set(alone)) > 2
