"""One HTTP request to an ASGI application as a call: for applications that other processes reach through Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from serving.access_log import RequestRecord, current_record, on_prompts

logger = logging.getLogger("ul2r.serving")

RECORD = "ul2r.record"
"""Type of the messages that bring back the record of a request: when its prompts are known, and at the end."""
SCOPE_KEYS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)
"""What a scope holds of the request; the rest belongs to the process that has received it."""

Messages = AsyncGenerator[list[Message]]
Backend = Callable[[Scope, bytes, RequestRecord | None], Messages]
"""Calls an application as `call_asgi` does."""


class BackendError(Exception):
    """The process that was called has ended, or takes no more calls."""


async def call_asgi(
    app: ASGIApp, scope: Scope, body: bytes, record: RequestRecord | None = None
) -> Messages:
    """Yield the messages of a response, as many as there are at a time, and the filled record.

    Closing the generator cancels the request.

    Args:
        app: The application.
        scope: The request; `SCOPE_KEYS` of it.
        body: Its whole body.
        record: Filled in by the application.
    """
    queue: asyncio.Queue[Message] = asyncio.Queue()
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            # Nothing follows: who hangs up closes the generator.
            await asyncio.Event().wait()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    def send_record(*, is_last: bool = False) -> None:
        queue.put_nowait({"type": RECORD, "record": record, "is_last": is_last})

    async def run() -> None:
        current_record.set(record)
        on_prompts.set(send_record)
        try:
            await app(scope, receive, queue.put)
        except Exception:
            # The application has answered with 500 already.
            logger.exception("%s %s failed", scope["method"], scope["path"])
        send_record(is_last=True)

    task = asyncio.create_task(run())
    try:
        is_over = False
        while not is_over:
            messages = [await queue.get()]
            while not queue.empty():
                messages.append(queue.get_nowait())
            is_over = messages[-1].get("is_last", False)
            yield messages
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def fetch(backend: Backend, path: str) -> tuple[int, bytes]:
    """Return status and body of a GET request.

    Raises:
        BackendError: If the backend has ended.
    """
    scope: MutableMapping[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": None,
        "server": None,
    }
    status = 500
    body = b""
    async with aclosing(backend(scope, b"", None)) as calls:
        async for messages in calls:
            for message in messages:
                status = message.get("status", status)
                body += message.get("body", b"")
    return status, body
