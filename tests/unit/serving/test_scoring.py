"""`echo` with `logprobs`: scores of given tokens equal a dense computation in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor
from transformers import AutoModelForCausalLM

from serving.api import create_api
from serving.service import InferenceService
from ul2r.inference import LanguageModel, complete
from ul2r.inference.engine import Engine
from ul2r.inference.engine.engine import _Row
from ul2r.testing.families import compute_reference_logits
from ul2r.testing.models import write_tiny_export

TEXT = "def area(width, height):"


def score_densely(
    folder: Path, inputs: list[int], targets: list[int], *, is_causal: bool
) -> list[list[float]]:
    """Return the log probabilities of the whole vocabulary before each target."""
    network = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokens = torch.tensor([[*inputs, *targets]])
    logits = compute_reference_logits(network, tokens, 1 if is_causal else len(inputs))
    rows: list[list[float]] = torch.log_softmax(logits[0], dim=-1)[len(inputs) - 1 : -1].tolist()
    return rows


@pytest.mark.parametrize("prefix_tokens", [1, 3, 7])
@pytest.mark.parametrize("kind", ["prefix", "sentinel", "causal"])
def test_the_tokens_behind_the_prefix_are_scored_exactly(
    tmp_path: Path, kind: str, prefix_tokens: int
) -> None:
    is_causal = kind == "causal"
    folder = write_tiny_export(
        tmp_path / "export",
        attention="causal" if is_causal else "prefix",
        prefix_sentinel=kind == "sentinel",
    )
    model = LanguageModel.load(folder)
    tokens = model.encode(TEXT)
    context, scored = tokens[:prefix_tokens], tokens[prefix_tokens:]
    inputs, openers = context, list[int]()
    if not is_causal:
        inputs = [*model.encode_mode("S2S", "a test"), *context, *model.inputs_end]
    if kind == "sentinel":
        assert model.vocabulary is not None
        # The sentinel closes the inputs, and opens the targets.
        sentinel = model.vocabulary.sentinels[0]
        inputs = [*model.encode_mode("S2S", "a test"), *context, sentinel, *model.inputs_end]
        openers = [sentinel]

    service = InferenceService(model, num_slots=2)
    body = {"prompt": tokens, "echo": True, "logprobs": 2, "max_tokens": 3, "seed": 1}
    with TestClient(create_api(service)) as client:
        response = client.post("/v1/completions", json={**body, "prefix_tokens": prefix_tokens})
        default = client.post("/v1/completions", json=body)
        bare = client.post("/v1/completions", json={**body, "prefix_tokens": 3, "max_tokens": 0})
    service.close()

    assert default.status_code == (200 if is_causal else 400)
    assert response.status_code == 200
    (choice,) = response.json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert logprobs["token_logprobs"][:prefix_tokens] == [None] * prefix_tokens
    rows = score_densely(folder, inputs, [*openers, *scored], is_causal=is_causal)[len(openers) :]
    expected = [row[token] for row, token in zip(rows, scored, strict=True)]
    given = logprobs["token_logprobs"][prefix_tokens : len(tokens)]
    assert given == pytest.approx(expected, abs=2e-5)
    for top, row in zip(logprobs["top_logprobs"][prefix_tokens : len(tokens)], rows, strict=True):
        assert max(top.values()) == pytest.approx(max(row), abs=2e-5)
    assert len(set(map(len, logprobs.values()))) == 1
    echoed = zip(logprobs["tokens"][: len(tokens)], logprobs["text_offset"], strict=False)
    assert all(TEXT[offset:].startswith(text) for text, offset in echoed)
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == len(inputs) + len(scored)
    assert usage["completion_tokens"] <= 3 + len(openers) + 1

    (unanswered,) = bare.json()["choices"]
    assert unanswered["text"] == TEXT
    assert len(unanswered["logprobs"]["tokens"]) == len(tokens)


def test_penalties_take_scored_tokens_for_the_prompt(causal_client: TestClient) -> None:
    """A causal model reads them like the rest of its prompt, so the answer is that of the prompt alone."""
    answer = {"prompt": TEXT, "max_tokens": 12, "min_tokens": 12}
    scored = {"echo": True, "logprobs": 0, "prefix_tokens": 2}
    answers = list[str]()
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        body = {**answer, penalty: 1.9}
        alone = causal_client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        echoed = causal_client.post("/v1/completions", json={**body, **scored})
        assert echoed.json()["choices"][0]["text"] == TEXT + alone
        answers.append(alone)
    plain = causal_client.post("/v1/completions", json=answer).json()["choices"][0]["text"]
    assert plain not in answers


def test_scored_tokens_leave_the_answers_of_others_alone(
    client: TestClient, model: LanguageModel
) -> None:
    scored = {"prompt": TEXT, "echo": True, "logprobs": 0, "prefix_tokens": 2, "max_tokens": 4}
    plain = {"prompt": "The sea", "max_tokens": 9}

    first = client.post("/v1/completions", json=scored).json()["choices"][0]
    answer = client.post("/v1/completions", json=plain).json()["choices"][0]
    again = client.post("/v1/completions", json=scored).json()["choices"][0]

    assert answer["text"] == complete(model, "The sea", max_tokens=9).text
    assert first == again


def test_a_prompt_that_is_not_scored_to_its_end_has_no_score(
    client: TestClient, service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the request is over after its second scored token."""
    engine = service.engine.engine
    assert isinstance(engine, Engine)
    accept = engine._accept

    def accept_two(row: _Row, token: int, logits: Tensor) -> bool:
        has_ended = accept(row, token, logits)
        if len(row.request.plan.spans[0]) == 2:
            row.request.deadline = 0.0
        return has_ended

    monkeypatch.setattr(engine, "_accept", accept_two)
    scored = {"prompt": TEXT, "echo": True, "logprobs": 0, "prefix_tokens": 2, "max_tokens": 0}
    response = client.post("/v1/completions", json=scored)

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "timeout"
