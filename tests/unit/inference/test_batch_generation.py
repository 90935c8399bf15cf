"""Many answers at once are the answers that each prompt gets alone, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch

from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, batch_generation, generate
from ul2r.inference.batch_generation import BatchRequest, generate_batch
from ul2r.inference.plans import CompletionPlan
from ul2r.inference.sampling import SamplingSettings
from ul2r.testing.models import write_tiny_export

TEXTS = [
    "The sea was calm,",
    "def area(width, height):",
    "The sea was calm, and so was he. " * 3,
    "he",
    "def area(width, height):",
]
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(write_tiny_export(tmp_path_factory.mktemp("batch") / "export"))


def make_requests(model: LanguageModel, temperature: float) -> list[BatchRequest]:
    stop = tuple(model.eos_token_ids)
    return [
        BatchRequest(
            tokens=(tokens := model.encode(text)),
            plan=CompletionPlan(stop, MAX_TOKENS),
            num_positions=len(tokens) + MAX_TOKENS,
            settings=SamplingSettings(temperature=temperature, seed=seed),
        )
        for seed, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_answer_has_the_tokens_that_it_gets_alone(
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    *,
    bidirectional: bool,
    temperature: float,
) -> None:
    # Fewer slots than answers: some wait for others.
    monkeypatch.setitem(batch_generation.MAX_ANSWERS, "cpu", 2)
    answers = dict(
        generate_batch(model, make_requests(model, temperature), bidirectional=bidirectional)
    )
    assert sorted(answers) == list(range(len(TEXTS)))
    for seed, text in enumerate(TEXTS):
        alone = list(
            generate(
                model,
                model.encode(text),
                max_tokens=MAX_TOKENS,
                stop=model.eos_token_ids,
                temperature=temperature,
                seed=seed,
                bidirectional=bidirectional,
            )
        )
        assert answers[seed].spans == (tuple(t for t in alone if t not in model.eos_token_ids),)


def test_model_computes_by_itself_afterwards(model: LanguageModel) -> None:
    tokens = torch.tensor([model.encode(TEXTS[2])])
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    before = model.forward(tokens, mask)
    answers = generate_batch(model, make_requests(model, 0.0), bidirectional=True)
    next(answers)
    # Not all are taken, as when a job is stopped.
    answers.close()  # type: ignore[attr-defined]  # an iterator that is a generator
    assert torch.equal(model.forward(tokens, mask), before)


def test_answer_ends_where_its_request_says(model: LanguageModel) -> None:
    (request, *_) = make_requests(model, 0.0)
    ended = BatchRequest(
        request.tokens, request.plan, request.num_positions, is_complete=lambda ids: len(ids) == 2
    )
    ((_, outcome),) = generate_batch(model, [ended], bidirectional=True)
    assert len(outcome.spans[0]) == 2


def test_setting_out_of_range_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="temperature=-1 is out of range"):
        list(generate_batch(model, make_requests(model, -1), bidirectional=True))
