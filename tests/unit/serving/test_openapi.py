"""Requests made of the API's own schema: valid ones and broken ones, of every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from serving.api import create_api
from serving.chat import ChatEncoder
from serving.schema import ErrorResponse
from serving.service import InferenceService
from ul2r.inference import LanguageModel
from ul2r.testing.models import write_tiny_export

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ROUTES = (
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "POST /beta/completions",
    "POST /v1/chat/completions",
    "POST /v1/infill",
    "POST /v1/fim/completions",
    "POST /infill",
    "POST /tokenize",
    "POST /detokenize",
)
few = settings(max_examples=25, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = write_tiny_export(tmp_path_factory.mktemp("openapi") / "export")
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }}:")
    service = InferenceService(LanguageModel.load(folder), ChatEncoder.load(folder), num_slots=4)
    yield create_api(service)
    service.close()


@pytest.fixture(scope="module")
def operations(api: FastAPI) -> dict[str, Any]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    found = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    return {operation.label: operation for operation in found}


def test_all_routes_are_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_schema_allows_is_answered_or_refused(
    operations: dict[str, Any], route: str
) -> None:
    """A request that fits the schema may still not fit the model: the refusal is an error object."""
    num_answered = 0

    @few
    @given(case=operations[route].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def run(case: Case[Any]) -> None:
        nonlocal num_answered
        make_likely(case)
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        num_answered += response.status_code == 200
        if response.status_code != 200:
            ErrorResponse.model_validate_json(response.content, strict=True)

    run()
    assert num_answered, "nothing but refusals was tried"


def make_likely(case: Case[Any]) -> None:
    """Let some requests fit the model."""
    if case.path_parameters:
        case.path_parameters["name"] = "tiny-ul2r"
    body: Any = case.body
    if not isinstance(body, dict):
        return
    body.pop("model", None)
    # A hundred answers of many tokens take long, and show no more.
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 3)
    if case.path == "/v1/infill":
        body["prompt"] = "a<slot>b" + body["prompt"]
        body.pop("slot", None)
    if case.path == "/infill":
        body["input_suffix"] = "b"
    if case.path == "/detokenize":
        body["tokens"] = [token % 300 for token in body["tokens"]]
    if case.path == "/tokenize":
        body.setdefault("prompt", "a")


@pytest.mark.parametrize("route", [route for route in ROUTES if route.startswith("POST")])
def test_what_the_schema_forbids_is_refused_with_an_error_object(
    operations: dict[str, Any], route: str
) -> None:
    @few
    @given(case=operations[route].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def run(case: Case[Any]) -> None:
        response = case.call()
        case.validate_response(response, checks=[*CHECKS, negative_data_rejection])
        assert 400 <= response.status_code < 500
        ErrorResponse.model_validate_json(response.content, strict=True)

    run()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/fim/completions", "/infill"])
def test_a_field_that_is_null_counts_as_not_given(client: TestClient, path: str) -> None:
    """OpenAI's clients may send every field that they know."""
    schema = client.get("/openapi.json").json()
    reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = reference["schema"]["$ref"].rpartition("/")[2]
    fields = schema["components"]["schemas"][name]["properties"]
    nullable = [key for key, field in fields.items() if {"type": "null"} in field.get("anyOf", ())]
    assert "stop" in nullable

    body = {"prompt": "a", "input_suffix": "b"}
    response = client.post(path, json={**dict.fromkeys(nullable), **body, "seed": 1})

    plain = client.post(path, json={**body, "seed": 1})
    assert (response.status_code, plain.status_code) == (200, 200)
    answers = [answer.json() for answer in (response, plain)]
    for answer in answers:
        for key in ("id", "created", "usage", "tokens_cached"):
            answer.pop(key, None)
    assert answers[0] == answers[1]
