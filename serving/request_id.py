"""Names of requests: the client's own `x-request-id`, or one made here. Neither torch nor Ray is imported."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""Other names are replaced: they end up in logs."""


def read_request_id(scope: Scope) -> str:
    """Return the name of a request, and write it into its headers if it has none that can be used."""
    name = Headers(scope=scope).get(HEADER, "")
    if VALID_ID.fullmatch(name):
        return name
    name = uuid.uuid4().hex
    headers = MutableHeaders(scope=scope)
    headers[HEADER] = name
    scope["headers"] = headers.raw
    return name


class RequestIdMiddleware:
    """Gives each request a name and each response the name of its request, once.

    Serve's proxy names requests as well, and its answers from replicas, but takes any header for a name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = read_request_id(scope)

        async def send_with_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Setting removes what Serve has appended.
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        await self._app(scope, receive, send_with_name)
