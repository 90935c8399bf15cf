"""Errors of Serve's proxy."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from serving.proxy_errors import ProxyErrorMiddleware


def answer(request: Request) -> Response:
    status = int(request.query_params["status"])
    if "json" in request.query_params:
        return JSONResponse({"error": "of a replica"}, status_code=status)
    return PlainTextResponse("Internal error, with a traceback", status_code=status)


client = TestClient(
    ProxyErrorMiddleware(Starlette(routes=[Route("/", answer), Route("/-/routes", answer)]))
)


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "loading"), (500, "replica_ended"), (503, "overloaded"), (408, "timeout")],
)
def test_the_proxys_own_errors_are_openais(status: int, code: str) -> None:
    response = client.get("/", params={"status": status})

    assert response.status_code == 503
    assert response.json()["error"]["code"] == code
    assert "traceback" not in response.text


@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_replicas_errors_pass(status: int) -> None:
    response = client.get("/", params={"status": status, "json": ""})

    assert (response.status_code, response.json()) == (status, {"error": "of a replica"})


def test_good_answers_and_the_proxys_own_pages_pass() -> None:
    assert client.get("/", params={"status": 200}).text.startswith("Internal")
    assert client.get("/-/routes", params={"status": 404}).status_code == 404


def test_a_replica_that_says_nothing_has_ended() -> None:
    """Of one that is killed Serve's proxy sends nothing at all; a server would make a 500 of it."""

    async def say_nothing(scope: Scope, receive: Receive, send: Send) -> None:
        return

    response = TestClient(ProxyErrorMiddleware(say_nothing)).get("/")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "replica_ended"
