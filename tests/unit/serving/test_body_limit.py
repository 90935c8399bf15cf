"""The limit on request bodies: what is read, what is answered, and what reaches the application."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import serving
from serving.api import create_api
from serving.body_limit import (
    MAX_BODY_BYTES,
    MAX_PROMPT_CHARACTERS,
    BodyLimitMiddleware,
    create_proxy_middleware,
)
from serving.service import InferenceService

LIMIT = 10


class EchoApp:
    """Application that reads a whole body and answers with it, as a Serve proxy would: it answers a lost client too."""

    def __init__(self) -> None:
        self.body = b""
        self.is_disconnected = False

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002  ASGI's signature
        receive: Receive,
        send: Send,
    ) -> None:
        more_body = True
        while more_body:
            message = await receive()
            self.is_disconnected = message["type"] == "http.disconnect"
            self.body += message.get("body", b"")
            more_body = message.get("more_body", False)
        status = 499 if self.is_disconnected else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": self.body})


def request(
    app: ASGIApp, chunks: Sequence[bytes], *, method: str = "POST", stated: str | None = None
) -> tuple[list[Message], int]:
    """Return the messages that an application sends, and the number of chunks that were read.

    Args:
        app: The application.
        chunks: Body; after the last one the client waits, so reading on would never return.
        method: HTTP method.
        stated: Content-Length.
    """
    sent: list[Message] = []
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        assert num_read < len(chunks), "read beyond what was sent"
        num_read += 1
        body = chunks[num_read - 1]
        return {"type": "http.request", "body": body, "more_body": num_read < len(chunks)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/v1/completions",
        "headers": [] if stated is None else [(b"content-length", stated.encode())],
    }

    async def run() -> None:
        await app(scope, receive, send)

    asyncio.run(run())
    return sent, num_read


def assert_refused(sent: Sequence[Message], limit: int, method: str = "POST") -> None:
    start, body = sent
    assert start["status"] == 413
    error = f"{method} /v1/completions: the body is larger than {limit:,} bytes: shorten the prompt"
    detail = json.loads(body["body"])["error"]
    assert (detail["message"], detail["code"]) == (error, "body_too_large")


@pytest.mark.parametrize("chunks", [[b"x" * LIMIT], [b"x" * 4, b"", b"x" * 6], [b""]])
def test_a_body_up_to_the_limit_passes_unchanged(chunks: list[bytes]) -> None:
    app = EchoApp()

    sent, num_read = request(BodyLimitMiddleware(app, LIMIT), chunks)

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"".join(chunks))
    assert num_read == len(chunks)


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_stated_length_beyond_the_limit_is_refused_before_anything_is_read(method: str) -> None:
    app = EchoApp()

    sent, num_read = request(
        BodyLimitMiddleware(app, LIMIT), [b"x"], method=method, stated=str(LIMIT + 1)
    )

    assert_refused(sent, LIMIT, method)
    assert num_read == 0


@pytest.mark.parametrize("stated", [None, "3"])
def test_a_body_is_refused_at_the_chunk_that_exceeds_the_limit(stated: str | None) -> None:
    app = EchoApp()
    chunks = [b"x" * 6, b"x" * 6, b"x" * 6]

    sent, num_read = request(BodyLimitMiddleware(app, LIMIT), chunks, stated=stated)

    assert_refused(sent, LIMIT)
    assert num_read == 2
    assert app.is_disconnected
    assert app.body == b"x" * 6, "what exceeds the limit reached the application"


def test_a_response_that_has_begun_is_not_answered_twice() -> None:
    async def early_app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"done"})

    sent, _ = request(BodyLimitMiddleware(early_app, LIMIT), [b"x" * 6] * 3)

    assert [message.get("status", message.get("body")) for message in sent] == [200, b"done"]


def test_the_longest_prompt_fits_in_its_longest_spelling() -> None:
    prompt = "\N{SLIGHTLY SMILING FACE}" * MAX_PROMPT_CHARACTERS
    fields = {"prompt": prompt, "slot": "\N{SLIGHTLY SMILING FACE}" * 100, "mode": "NLU"}

    body = json.dumps(fields | {"max_tokens": 10**6, "temperature": 1.0, "seed": 2**63 - 1})

    assert MAX_BODY_BYTES - 2**16 < len(body) <= MAX_BODY_BYTES


@pytest.mark.parametrize("chunks", [[], [b"x" * 2**22] * 4])
def test_every_route_of_the_api_has_the_limit(chunks: list[bytes]) -> None:
    # Refused before the service is asked for anything, so none is needed.
    service = InferenceService.__new__(InferenceService)
    stated = None if chunks else str(MAX_BODY_BYTES + 1)

    sent, num_read = request(create_api(service), chunks, stated=stated)

    assert_refused(sent, MAX_BODY_BYTES)
    assert num_read == min(len(chunks), 3)


def test_proxies_of_serve_get_the_limit_from_the_environment() -> None:
    variable = os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]

    assert variable == f"{serving.__name__}.body_limit:{create_proxy_middleware.__name__}"
    app: ASGIApp = EchoApp()
    for middleware in create_proxy_middleware():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    sent, num_read = request(app, [], stated=str(MAX_BODY_BYTES + 1))
    assert_refused(sent, MAX_BODY_BYTES)
    assert num_read == 0
    # A refusal has a name, too.
    assert b"x-request-id" in dict(sent[0]["headers"])
    program = "import sys, serving.body_limit; assert not {'torch', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
