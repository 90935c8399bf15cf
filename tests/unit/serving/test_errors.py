"""Every error is OpenAI's error object, with its reason in one line."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from serving.api import create_api
from serving.service import InferenceService

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"", 400, "body: field required"),
        ("completions", b"[]", 400, "body: input should be a valid dictionary"),
        ("completions", b'{"prompt": "a"', 400, "malformed JSON at character 14: Expecting ','"),
        ("completions", b'{"prompt": "\xff"}', 400, "error parsing the body"),
        ("completions", b'{"prompt": "\\ud800"}', 400, "prompt"),
        ("completions", b'{"prompt": ""}', 400, "the prompt is empty"),
        ("completions", b'{"prompt": []}', 400, "the prompt is empty"),
        ("completions", b"{}", 400, "prompt: field required"),
        ("completions", b'{"prompt": "a", "n": 0}', 400, "n: input should be greater than"),
        ("completions", b'{"prompt": "a", "mode": "R"}', 400, "mode: input should be 'S2S', 'NLU'"),
        ("completions", b'{"prompt": "a", "max_tokens": "3"}', 400, "valid integer, got '3'"),
        ("completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens=0 is out of range"),
        ("completions", b'{"prompt": "a", "max_tokens": 127}', 400, "choose 1 to 126"),
        ("completions", b'{"prompt": "a", "temperature": -1}', 400, "temperature: input should be"),
        ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "a finite number, got nan"),
        ("completions", b'{"prompt": "a", "top_p": 2}', 400, "top_p=2.0 is out of range"),
        ("completions", b'{"prompt": "a", "seed": 1.5}', 400, "seed: input should be a valid int"),
        ("completions", b'{"prompt": [1, 99999]}', 400, "the model has no token 99999"),
        ("completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "'x' is no token id"),
        ("completions", b'{"prompt": "a", "logit_bias": {"999": 1}}', 400, "no token 999"),
        (
            "completions",
            b'{"prompt": "a", "logit_bias": {"%s": 1}}' % (b"9" * 5000),
            400,
            "no token",
        ),
        ("completions", b'{"prompt": "a", "n": 128}', 400, "128 answers (n for each prompt)"),
        ("completions", b'{"prompt": "a", "repetition_penalty": 1e-40}', 400, "0.01 to 100"),
        ("completions", b'{"prompt": "a", "best_of": 3}', 400, "answers are not ranked here"),
        (
            "completions",
            b'{"prompt": "a", "echo": true, "logprobs": 1}',
            400,
            "undefined where its tokens see each other in both directions",
        ),
        (
            "completions",
            b'{"prompt": "a", "echo": true, "logprobs": 1, "prefix_tokens": 9}',
            400,
            "prefix_tokens=9 is out of range",
        ),
        ("completions", b'{"prompt": "a", "prefix_tokens": 1}', 400, "with echo and logprobs"),
        ("completions", b'{"prompt": [1], "suffix": "b"}', 400, "give the prompt as text"),
        ("completions", b'{"prompt": "a", "model": "gpt"}', 404, "name 'tiny-ul2r', or none"),
        ("chat/completions", b'{"messages": [{"role": "user"}]}', 400, "has no chat template"),
        ("infill", b'{"prompt": "a <slot>", "slot": ""}', 400, "slot: string should have at least"),
        ("infill", b'{"prompt": "<slot>"}', 400, "the prompt is empty"),
        ("infill", b'{"prompt": "a<slot><slot>"}', 400, "slots 1 and 2 are adjacent"),
        ("infill", b'{"prompt": "no place"}', 400, "mark each place to fill with <slot>"),
    ],
)
def test_a_bad_request_gets_its_reason_in_one_line(
    client: TestClient, path: str, body: bytes, status: int, message: str
) -> None:
    response = client.post(f"/v1/{path}", content=body, headers=JSON)

    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300


def test_a_body_without_content_type_is_refused(client: TestClient) -> None:
    response = client.post("/v1/completions", content=b'{"prompt": "a"}')

    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert "with the header content-type: application/json" in response.json()["error"]["message"]


def test_a_fault_of_the_server_is_answered_in_json(
    service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> list[int]:
        raise ZeroDivisionError(text)

    monkeypatch.setattr(service.model, "encode", fail)
    client = TestClient(create_api(service), raise_server_exceptions=False)

    response = client.post("/tokenize", json={"prompt": "secret"})

    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "ZeroDivisionError" in error["message"]
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/v1/infill", 405)]
)
def test_a_wrong_url_or_method_is_refused_in_json(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)

    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(f"{method} {path}: ")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/complete", "is it /v1/completions?"),
        ("/v1/chat/completion", "is it /v1/chat/completions?"),
        ("/metric", "is it /metrics?"),
        ("/xyz", "/docs lists the routes"),
    ],
)
def test_a_wrong_url_gets_the_nearest_one(client: TestClient, path: str, hint: str) -> None:
    assert client.post(path, json={}).json()["error"]["message"].endswith(hint)


def test_a_very_long_prompt_is_refused_without_repeating_it(client: TestClient) -> None:
    response = client.post("/v1/infill", json={"prompt": "a" * 1_000_001})

    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "prompt: string should have at most 1000000 characters"
