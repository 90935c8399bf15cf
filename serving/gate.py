"""The way into the API: keys, the access log, and the end of a server that still has requests."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access_log import AccessLog, RequestRecord, current_record, on_prompts
from serving.api_keys import ApiKeys
from serving.request_id import read_request_id
from ul2r.config.strict_model import StrictModel
from ul2r.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterable

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health"})
"""Pages without a key: they tell nothing that the source does not, and /health is for machines."""
BODILESS_METHODS = frozenset({"GET", "HEAD"})


class AccessConfig(StrictModel):
    """Who comes in, and what is written down."""

    api_keys: Path | None = None
    """File with a key a line; every node reads its own. Default: everybody comes in."""
    access_log: Path | None = None
    """File for a line of JSON for each request. Default: none is written."""
    log_prompts: bool = False
    """Write prompts into the access log, too."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API from a browser, or "*" for all. Default: only the server's own."""


class Gate:
    """Lets requests in, as long as the server is not at its end.

    Args:
        config: Who comes in, and what is written down.

    Raises:
        ServiceError: If the file of keys cannot be read or the log cannot be written.
    """

    def __init__(self, config: AccessConfig | None = None) -> None:
        config = config or AccessConfig()
        self.cors_origins = config.cors_origins
        self._keys = None if config.api_keys is None else ApiKeys(config.api_keys)
        self.log = (
            None
            if config.access_log is None
            else AccessLog(config.access_log, has_prompts=config.log_prompts)
        )
        self._num_open = 0
        self._is_draining = False
        self._is_idle = asyncio.Event()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, and wait until those that have begun have ended.

        Args:
            timeout_s: Time after which nobody is waited for any longer.

        Returns:
            Number of requests that have not ended.
        """
        self._is_draining = True
        if self._num_open:
            self._is_idle.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._is_idle.wait()
            except TimeoutError:
                return self._num_open
        return 0

    def open_request(self) -> None:
        """Count a request that has come in."""
        self._num_open += 1

    def close_request(self) -> None:
        """Count a request that has ended."""
        self._num_open -= 1
        if not self._num_open:
            self._is_idle.set()

    def refuse(self, scope: Scope, record: RequestRecord) -> Response | None:
        """Return the refusal of a request, or None if it may come in."""
        if self._is_draining:
            return _make_refusal(
                503,
                "the server is shutting down: try again on another one",
                code="shutting_down",
                headers={"retry-after": "5", "connection": "close"},
            )
        # Other methods have bodies, which are read only of those who have a key.
        is_open = scope["path"] in OPEN_PATHS and scope["method"] in BODILESS_METHODS
        if self._keys is None or is_open:
            return None
        try:
            record.key = self._keys.identify(Headers(scope=scope).get("authorization", ""))
        except ServiceError:
            return _make_refusal(503, "the server's keys cannot be read", code="keys_unavailable")
        if record.key is None:
            return _make_refusal(
                401,
                "no valid key: send one that the server knows, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return None


class GateMiddleware:
    """Asks a gate about every request, and writes the access log."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = RequestRecord(
            request_id=read_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else None,
        )
        if self._gate.log is not None and self._gate.log.has_prompts:
            record.prompts = []
        refusal = self._gate.refuse(scope, record)
        self._gate.open_request()
        token = current_record.set(record)
        start = time.monotonic()

        async def send_and_observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            elif record.first_token_seconds is None and message.get("body"):
                record.first_token_seconds = round(time.monotonic() - start, 6)
            await send(message)
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            record.is_complete |= is_last

        try:
            await (refusal or self._app)(scope, receive, send_and_observe)
        except Exception:
            # Starlette answers it outside of all middleware.
            record.status = record.status or 500
            raise
        finally:
            current_record.reset(token)
            self._gate.close_request()
            record.seconds = round(time.monotonic() - start, 6)
            if self._gate.log is not None:
                self._gate.log.write(record)


def add_gate(api: Starlette, gate: Gate) -> None:
    """Put a gate before an application."""
    api.add_middleware(GateMiddleware, gate=gate)
    if gate.cors_origins:
        # Before the gate: a browser asks without a key whether it may send one.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=gate.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-fields", "retry-after"],
        )


def record_prompts(model: str, num_tokens: int, texts: Iterable[str]) -> None:
    """Note the model and, if prompts are logged, the prompts of the request that is being handled."""
    record = current_record.get()
    if record is not None:
        record.model = model
        record.prompt_tokens = num_tokens
        if record.prompts is not None:
            record.prompts += texts
        if (publish := on_prompts.get()) is not None:
            publish()


def record_answer(completion_tokens: int, finish_reasons: Iterable[str]) -> None:
    """Note an answer of the request that is being handled."""
    record = current_record.get()
    if record is not None:
        record.completion_tokens = (record.completion_tokens or 0) + completion_tokens
        record.finish_reasons += finish_reasons


def _make_refusal(
    status: int, message: str, *, code: str, headers: dict[str, str] | None = None
) -> Response:
    type_ = "server_error" if status >= 500 else "invalid_request_error"
    detail = {"message": message, "type": type_, "param": None, "code": code}
    return JSONResponse({"error": detail}, status_code=status, headers=headers)
