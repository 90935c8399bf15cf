"""HTTP API without Ray: responses equal the library's results, and every error is one line of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.api import create_api
from serving.service import InferenceService
from ul2r.inference import LanguageModel, complete, infill
from ul2r.testing.models import write_tiny_export

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(write_tiny_export(tmp_path_factory.mktemp("api") / "export"))


@pytest.fixture(scope="module")
def client(model: LanguageModel) -> Iterator[TestClient]:
    with TestClient(create_api(InferenceService(model))) as client:
        yield client


@pytest.fixture(scope="module")
def causal_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = write_tiny_export(tmp_path_factory.mktemp("api") / "causal", attention="causal")
    with TestClient(create_api(InferenceService(LanguageModel.load(folder)))) as client:
        yield client


def test_a_completion_has_text_finish_reason_usage_and_model(
    client: TestClient, model: LanguageModel
) -> None:
    request = {"prompt": "def area(", "max_tokens": 5, "temperature": 1.5, "seed": 9}
    expected = complete(model, "def area(", max_tokens=5, temperature=1.5, seed=9)

    response = client.post("/v1/complete", json=request)

    assert response.status_code == 200
    assert response.json() == {
        "text": expected.text,
        "finish_reason": expected.finish_reason,
        "usage": {
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": expected.completion_tokens,
        },
        "model": {"run": "tiny-ul2r", "role": "ul2r", "step": 3},
    }


def test_infilling_splits_the_prompt_at_its_slots(client: TestClient, model: LanguageModel) -> None:
    request = {"prompt": "The <slot> was calm<slot>", "mode": "NLG", "max_tokens": 4}
    expected = infill(model, ["The ", " was calm", ""], mode="NLG", max_tokens=4)

    response = client.post("/v1/infill", json=request).json()

    assert response == {
        "text": f"The {expected.fills[0]} was calm{expected.fills[1]}",
        "fills": list(expected.fills),
        "finish_reasons": list(expected.finish_reasons),
        "usage": {
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": expected.completion_tokens,
        },
        "model": {"run": "tiny-ul2r", "role": "ul2r", "step": 3},
    }


def test_with_another_marker_the_default_one_is_plain_text(
    client: TestClient, model: LanguageModel
) -> None:
    request = {"prompt": "a <slot> is @@ here", "slot": "@@", "max_tokens": 2}
    expected = infill(model, ["a <slot> is ", " here"], max_tokens=2)

    assert client.post("/v1/infill", json=request).json()["text"] == expected.text


def test_the_model_states_its_modes_and_limits(client: TestClient) -> None:
    assert client.get("/v1/model").json() == {
        "run": "tiny-ul2r",
        "role": "ul2r",
        "step": 3,
        "attention": "prefix",
        "modes": ["NLG", "NLU", "S2S"],
        "tokens": 3000,
        "flops": 3e9,
        "limits": {"max_model_len": 128, "max_slots": 7, "default_max_tokens": 64},
    }


def test_a_causal_model_has_neither_modes_nor_slots(causal_client: TestClient) -> None:
    info = causal_client.get("/v1/model").json()
    assert (info["attention"], info["modes"], info["limits"]["max_slots"]) == ("causal", [], 0)

    response = causal_client.post("/v1/infill", json={"prompt": "a <slot>"})
    assert response.status_code == 400
    assert "'tiny-base' was trained causally" in response.json()["error"]

    assert causal_client.post("/v1/complete", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("complete", b"", 422, "body: field required"),
        ("complete", b"[]", 422, "body: input should be a valid dictionary"),
        (
            "complete",
            b'{"prompt": "a"',
            400,
            "malformed JSON at character 14: Expecting ',' delimiter",
        ),
        ("complete", b'{"prompt": "\xff"}', 400, "error parsing the body"),
        ("complete", b'{"prompt": "\\ud800"}', 422, "prompt: input should be a valid string"),
        ("complete", b'{"prompt": ""}', 400, "the prompt is empty"),
        ("complete", b"{}", 422, "prompt: field required"),
        ("complete", b'{"prompt": 1, "n": 2}', 422, "valid string, got 1 (and 1 more)"),
        ("complete", b'{"prompt": "a", "mode": "R"}', 422, "mode: input should be 'S2S', 'NLU'"),
        ("complete", b'{"prompt": "a", "max_tokens": "3"}', 422, "valid integer, got '3'"),
        ("complete", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens=0 is out of range"),
        ("complete", b'{"prompt": "a", "max_tokens": 127}', 400, "choose 1 to 126"),
        ("complete", b'{"prompt": "a", "max_tokens": 9999999}', 422, "max_tokens: input should be"),
        ("complete", b'{"prompt": "a", "temperature": -1}', 422, "temperature: input should be"),
        ("complete", b'{"prompt": "a", "temperature": NaN}', 422, "a finite number, got nan"),
        ("complete", b'{"prompt": "a", "seed": 1.5}', 422, "seed: input should be a valid integer"),
        ("infill", b'{"prompt": "a <slot>", "slot": ""}', 422, "slot: string should have at least"),
        ("infill", b'{"prompt": "<slot>"}', 400, "the prompt is empty"),
        ("infill", b'{"prompt": "a<slot><slot>"}', 400, "slots 1 and 2 are adjacent"),
    ],
)
def test_a_bad_request_gets_its_reason_in_one_line_of_json(
    client: TestClient, path: str, body: bytes, status: int, message: str
) -> None:
    response = client.post(f"/v1/{path}", content=body, headers=JSON)

    assert response.status_code == status
    error = response.json()
    assert list(error) == ["error"]
    assert message in error["error"]
    assert "\n" not in error["error"]


def test_a_body_without_content_type_is_refused(client: TestClient) -> None:
    response = client.post("/v1/complete", content=b'{"prompt": "a"}')

    assert (response.status_code, list(response.json())) == (422, ["error"])


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/v1/infill", 405)]
)
def test_a_wrong_url_or_method_is_refused_in_json(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)

    assert response.status_code == status
    assert response.json()["error"].startswith(f"{method} {path}: ")


def test_a_very_long_prompt_is_refused_without_repeating_it(client: TestClient) -> None:
    response = client.post("/v1/complete", json={"prompt": "a" * 1_000_001})

    assert response.status_code == 422
    assert response.json()["error"] == "prompt: string should have at most 1000000 characters"


def test_the_playground_loads_nothing_from_other_hosts(client: TestClient) -> None:
    page = client.get("/")

    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text
    assert (Path(__file__).parents[3] / "serving" / "playground.html").read_text() == page.text


def test_openapi_lists_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    assert set(paths) == {"/healthz", "/v1/model", "/v1/complete", "/v1/infill"}
