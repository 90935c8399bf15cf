"""Errors of Serve's proxy itself as OpenAI's error objects; proxies import this, so neither torch nor Ray is."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REASONS = {
    404: (503, "no model is served yet: it is loading, or the server is ending", "loading", "2"),
    408: (503, "the request took longer than the server allows", "timeout", None),
    500: (503, "the replica ended before its answer: try again", "replica_ended", "1"),
    503: (503, "the server is overloaded or starting: try again", "overloaded", "1"),
}
"""By the proxy's status: the status that is sent, the message, its code and when to come again."""


class ProxyErrorMiddleware:
    """Replaces the proxy's own errors, which are plain text; those of a replica are JSON and pass."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        has_started = is_replaced = False

        async def send_or_replace(message: Message) -> None:
            nonlocal has_started, is_replaced
            has_started = True
            if message["type"] == "http.response.start" and message["status"] in REASONS:
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_replaced = kind.startswith("text/plain")
                if is_replaced:
                    await _respond(message["status"], scope, receive, send)
            if not is_replaced:
                await send(message)

        await self._app(scope, receive, send_or_replace)
        # Of a replica that has died Serve 2.60 sends nothing, and the server would send a 500 of its own.
        if not has_started:
            await _respond(500, scope, receive, send)


async def _respond(cause: int, scope: Scope, receive: Receive, send: Send) -> None:
    status, message, code, retry_after = REASONS[cause]
    detail = {"message": message, "type": "server_error", "param": None, "code": code}
    headers = None if retry_after is None else {"retry-after": retry_after}
    await JSONResponse({"error": detail}, status_code=status, headers=headers)(scope, receive, send)
