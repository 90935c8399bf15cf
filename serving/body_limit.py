"""Limit on the size of request bodies, for the replicas and for the proxies of Ray Serve in front of them.

Serve's proxy reads a body as fast as it arrives and keeps it in memory until the replica asks for it
(`HTTPProxy.proxy_asgi_receive` of Ray 2.60), so a limit in the replica alone would bound only the replica. Proxies
import this module, which therefore imports neither torch nor the model.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.proxy_errors import ProxyErrorMiddleware
from serving.request_id import RequestIdMiddleware

MAX_PROMPT_CHARACTERS = 1_000_000
"""Longer prompts are refused before they are tokenized."""
MAX_BODY_BYTES = 12 * MAX_PROMPT_CHARACTERS + 2**16
"""Larger bodies are refused with 413. JSON spells a character in at most 12 bytes (an escaped surrogate pair); the rest
is room for the other fields."""


class BodyLimitMiddleware:
    """Answers 413 to a request whose body is too large: by its Content-Length at once, else while it is read.

    The application behind it sees a client that disconnects. What still arrives of the body is dropped by the server.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        await self._limit(scope, receive, send)

    async def _limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, and answer in its place once it has read more than the limit."""
        num_bytes = 0
        has_started = False

        async def receive_up_to_limit() -> Message:
            nonlocal num_bytes
            if num_bytes <= self._max_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if num_bytes <= self._max_bytes:
                    return message
                # A response that has begun cannot be replaced; the rest of the body is withheld all the same.
                if not has_started:
                    await self._refuse(scope, receive, send)
            return {"type": "http.disconnect"}

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_started
            if has_started or num_bytes <= self._max_bytes:
                has_started = True
                await send(message)

        await self._app(scope, receive_up_to_limit, send_unless_refused)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = (
            f"{scope['method']} {scope['path']}: the body is larger than {self._max_bytes:,} bytes: "
            "shorten the prompt"
        )
        # In the shape of all errors, `ErrorResponse`.
        detail = {
            "message": error,
            "type": "invalid_request_error",
            "param": None,
            "code": "body_too_large",
        }
        await JSONResponse({"error": detail}, status_code=413)(scope, receive, send)


def create_proxy_middleware() -> list[Middleware]:
    """Return the middleware of a Serve proxy, which finds this function by an environment variable (`serving`)."""
    # Serve wraps its proxy in them one after the other: the last one is the first to see a request.
    return [
        Middleware(ProxyErrorMiddleware),
        Middleware(BodyLimitMiddleware),
        Middleware(RequestIdMiddleware),
    ]
