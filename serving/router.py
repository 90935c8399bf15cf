"""Several models behind one address: each request goes to the model that it names. No Ray here."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serving.access_log import RequestRecord, current_record
from serving.asgi_call import RECORD, SCOPE_KEYS, Backend, BackendError, fetch
from serving.body_limit import BodyLimitMiddleware
from serving.errors import add_error_handlers, make_error_response
from serving.gate import BODILESS_METHODS, Gate, add_gate
from serving.service import UnknownModelError

logger = logging.getLogger("ul2r.serving")

RECORD_TIMEOUT_S = 10.0
"""Time that a model has, after the end of its answer, to say what it was."""


def create_router(backends: Mapping[str, Backend], gate: Gate | None = None) -> FastAPI:
    """Return the application in front of some models.

    Args:
        backends: Their applications by the names of the models; the first one answers requests that name none.
        gate: Asked about each request; None lets everything in.
    """
    api = FastAPI(title="UL2R", docs_url=None, redoc_url=None, openapi_url=None)
    router = _Router(backends)

    @api.get("/v1/models")
    async def list_models() -> Response:
        bodies = await fetch_answers(backends, "/v1/models")
        cards = [card for body in bodies.values() for card in json.loads(body)["data"]]
        return JSONResponse({"object": "list", "data": cards})

    @api.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        _, backend = router.find(name)
        status, body = await fetch(backend, f"/v1/models/{name}")
        return Response(body, status_code=status, media_type="application/json")

    @api.get("/health")
    async def health() -> Response:
        # The first one that cannot answer speaks for all.
        answers = await asyncio.gather(*(fetch(b, "/health") for b in backends.values()))
        status, body = max(answers, key=lambda answer: answer[0])
        return Response(body, status_code=status, media_type="application/json")

    @api.get("/metrics")
    async def metrics() -> Response:
        pages = await fetch_answers(backends, "/metrics")
        text = merge_metrics({name: page.decode() for name, page in pages.items()})
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(BackendError)
    async def handle_backend_error(_: Request, error: BackendError) -> JSONResponse:
        return make_backend_response(error)

    # What has no route here has one in the models' own applications, or gets their 404.
    api.router.default = router.forward
    add_error_handlers(api)
    api.add_middleware(BodyLimitMiddleware)
    if gate is not None:
        add_gate(api, gate)
    return api


class _Router:
    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._default = next(iter(backends))

    def find(self, name: str | None) -> tuple[str, Backend]:
        """Return a model's name and backend; those of the default model for None.

        Raises:
            UnknownModelError: If there is none of that name.
        """
        name = self._default if name is None else name
        backend = self._backends.get(name)
        if backend is None:
            served = ", ".join(map(repr, self._backends))
            raise UnknownModelError(
                f"the model {name!r} is not served here: name one of {served}, or none"
            )
        return name, backend

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its response back as it comes."""
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        try:
            body = await _read_body(scope, receive)
        except ClientDisconnect:
            # Nobody waits, or `BodyLimitMiddleware` has answered.
            return
        is_sent = False

        async def send_and_notice(message: Message) -> None:
            nonlocal is_sent
            await send(message)
            is_sent |= message["type"] == "http.response.body" and not message.get("more_body")

        # Serve cancels the call when its client leaves. Other servers, such as uvicorn, only tell `receive` of it.
        answering = asyncio.create_task(self._answer(body, scope, receive, send_and_notice))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if is_sent:
                # Its client may leave at once; the record of the request is still on its way.
                await asyncio.wait((answering,), timeout=RECORD_TIMEOUT_S)
            # What went wrong in the one that ended is this call's error.
            (answering if answering.done() else leaving).result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        record = current_record.get()
        is_started = False
        request = {key: scope[key] for key in SCOPE_KEYS if key in scope}
        try:
            name, backend = self.find(_read_model(body))
            if record is not None:
                # Its process can no longer say so if the client leaves.
                record.model = name
            async with aclosing(backend(request, body, record)) as calls:
                async for messages in calls:
                    for message in messages:
                        if message["type"] == RECORD:
                            _fill(record, message["record"])
                            continue
                        is_started = True
                        await send(message)
        except UnknownModelError as error:
            await make_error_response(error)(scope, receive, send)
        except BackendError as error:
            # A response that has begun can only be cut.
            if is_started:
                raise
            await make_backend_response(error)(scope, receive, send)


async def _wait_for_disconnect(receive: Receive) -> None:
    # A body that was not read comes first.
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    # Those who read pages without a key send by these methods, whose bodies mean nothing.
    if scope["method"] in BODILESS_METHODS:
        return b""
    return await Request(scope, receive).body()


def _read_model(body: bytes) -> str | None:
    """Return the model that a request names; one that cannot be read goes to the default model, which says why."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = request.get("model") if isinstance(request, dict) else None
    return name if isinstance(name, str) else None


def _fill(record: RequestRecord | None, filled: RequestRecord | None) -> None:
    """Take over what a model's process knows of a request."""
    if record is None or filled is None:
        return
    for name in ("prompt_tokens", "completion_tokens", "finish_reasons", "prompts"):
        setattr(record, name, getattr(filled, name))


async def fetch_answers(backends: Mapping[str, Backend], path: str) -> dict[str, bytes]:
    """Return the pages of all models that answer, by their names.

    Raises:
        BackendError: If none of them does.
    """
    answers = await asyncio.gather(
        *(fetch(backend, path) for backend in backends.values()), return_exceptions=True
    )
    pages = dict[str, bytes]()
    for name, answer in zip(backends, answers, strict=True):
        if isinstance(answer, BackendError):
            logger.warning("%s of %s: %s", path, name, answer)
        elif isinstance(answer, BaseException):
            raise answer
        elif answer[0] == 200:
            pages[name] = answer[1]
    if not pages:
        raise BackendError("no model can answer")
    return pages


def merge_metrics(pages: Mapping[str, str]) -> bytes:
    """Return metrics of several models on one page, with the model as a label."""
    families = dict[str, Metric]()
    for model, page in pages.items():
        for family in text_string_to_metric_families(page):
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={"model": model, **sample.labels}))

    class Pages:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry()
    registry.register(Pages())
    return generate_latest(registry)


def make_backend_response(error: BackendError) -> JSONResponse:
    """Return the response to a request whose model's process cannot answer."""
    detail: dict[str, Any] = {
        "message": f"{error}: try again",
        "type": "server_error",
        "param": None,
        "code": "replica_ended",
    }
    return JSONResponse({"error": detail}, status_code=503, headers={"retry-after": "1"})
