"""Names of requests."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from serving.request_id import RequestIdMiddleware


def show_name(request: Request) -> Response:
    """Answer with the name, and with a header of its own, as Serve's proxy appends one."""
    name = request.headers["x-request-id"]
    return PlainTextResponse(name, headers={"x-request-id": "of the proxy"})


@pytest.fixture
def client() -> TestClient:
    return TestClient(RequestIdMiddleware(Starlette(routes=[Route("/", show_name)])))


def test_a_clients_name_comes_back_once(client: TestClient) -> None:
    response = client.get("/", headers={"x-request-id": "abc-1"})

    assert response.text == "abc-1"
    assert response.headers.get_list("x-request-id") == ["abc-1"]


@pytest.mark.parametrize("name", [None, "", "two words", "x" * 129, "a\tb"])
def test_a_name_that_logs_cannot_hold_is_replaced(client: TestClient, name: str | None) -> None:
    response = client.get("/", headers={} if name is None else {"x-request-id": name})

    (given,) = response.headers.get_list("x-request-id")
    assert response.text == given != name
    assert len(given) == 32
