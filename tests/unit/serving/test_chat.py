"""Conversations, written out by the template of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.chat import ChatEncoder
from serving.service import InferenceService
from ul2r.inference import LanguageModel, complete

TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif -%}
{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}assistant:{% endif -%}
"""
PROMPT = "user: The sea\nassistant:"
MESSAGES = [{"role": "user", "content": "The sea"}]


@pytest.fixture
def client(
    client: TestClient,
    service: InferenceService,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> TestClient:
    """The served model with a chat template."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    encoder = ChatEncoder.load(tmp_path)
    assert encoder is not None
    monkeypatch.setattr(service, "chat_template", encoder)
    return client


@pytest.mark.parametrize(
    "content", ["The sea", [{"type": "text", "text": "The "}, {"type": "text", "text": "sea"}]]
)
def test_a_conversation_is_answered(
    client: TestClient, model: LanguageModel, content: object
) -> None:
    expected = complete(model, PROMPT, max_tokens=6)
    request = {
        "model": "tiny-ul2r",
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }

    body = client.post("/v1/chat/completions", json=request).json()

    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == expected.text
    assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert body["usage"]["completion_tokens"] == expected.completion_tokens


def test_a_stream_begins_with_the_role_of_each_choice(
    client: TestClient, model: LanguageModel
) -> None:
    expected = [
        complete(model, PROMPT, max_tokens=6, temperature=1.0, seed=seed) for seed in (3, 4)
    ]
    request = {"messages": MESSAGES, "max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}

    response = client.post("/v1/chat/completions", json=request | options)

    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    *chunks, usage = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    for number, alone in enumerate(expected):
        first, *others, last = [choice for choice in choices if choice["index"] == number]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"]["content"] for choice in others) == alone.text
        assert (last["delta"], last["finish_reason"]) == ({}, alone.finish_reason)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == sum(alone.completion_tokens for alone in expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"messages": [{"role": "system", "content": "a"}]}', "refuses them: no system messages"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
            "messages: the chat template refuses them: 'utf-8' codec can't encode",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "content of type 'image_url' is no text",
        ),
        (b'{"messages": []}', "messages: list should have at least 1 item"),
        (b'{"messages": [{"role": "user"}], "tools": [{}]}', "tools and response_format are not"),
    ],
)
def test_what_the_model_cannot_read_is_refused(
    client: TestClient, body: bytes, message: str
) -> None:
    response = client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )

    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
