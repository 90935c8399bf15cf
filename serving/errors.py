"""One JSON shape for all errors: OpenAI's error object. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.service import UnknownModelError
from ul2r.errors import RequestError
from ul2r.inference.engine import DeadlineError, EngineStoppedError, QueueFullError

MAX_SHOWN_CHARACTERS = 60
"""Longer values are not repeated in an error message."""


def add_error_handlers(api: FastAPI) -> None:
    """Replace FastAPI's own handlers, whose bodies have another shape: {"detail": ...}."""

    @api.exception_handler(RequestError)
    async def handle_request_error(_: Request, error: RequestError) -> JSONResponse:
        return make_error_response(error)

    # Starlette logs the error behind it, too.
    @api.exception_handler(Exception)
    async def handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
        return _respond(
            500,
            f"{type(error).__name__} in the server, which has logged it",
            type_="server_error",
            code="internal_error",
        )

    @api.exception_handler(RequestValidationError)
    async def handle_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # The body is not JSON at all: FastAPI reports this, too, as a validation error.
        if first["type"] == "json_invalid":
            position = first["loc"][-1]
            reason = first["ctx"]["error"]
            return _respond(400, f"malformed JSON at character {position}: {reason}")
        # FastAPI parses a body only if its type is JSON's.
        if isinstance(first["input"], bytes):
            return _respond(400, "body: send JSON, with the header content-type: application/json")
        return _respond(400, _describe(error.errors()), param=_name_field(first))

    # Starlette's class: the router raises it for 404 and 405, and FastAPI's own derives from it.
    @api.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            message += _suggest_route(request)
        return _respond(error.status_code, message, headers=error.headers)


def make_error_response(error: Exception) -> JSONResponse:
    """Return the response to a request that could not be answered."""
    if isinstance(error, QueueFullError):
        return _respond(
            429,
            str(error),
            type_="rate_limit_error",
            code="queue_full",
            headers={"retry-after": str(error.retry_after)},
        )
    if isinstance(error, DeadlineError):
        return _respond(503, str(error), type_="server_error", code="timeout")
    if isinstance(error, EngineStoppedError):
        return _respond(
            503,
            str(error),
            type_="server_error",
            code="unavailable",
            headers={"retry-after": "1"},  # the replica is being replaced
        )
    if isinstance(error, UnknownModelError):
        return _respond(404, str(error), param="model", code="model_not_found")
    return _respond(400, str(error))


def _suggest_route(request: Request) -> str:
    """Return the route whose path is most like that of a request, if one is."""
    paths = [route.path for route in request.app.routes if hasattr(route, "path")]
    nearest = get_close_matches(request.url.path[:MAX_SHOWN_CHARACTERS], paths, n=1)
    return f": is it {nearest[0]}?" if nearest else f": {request.base_url}docs lists the routes"


def _describe(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the first validation error with its field and value, and the number of further ones."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = first["msg"][:1].lower() + first["msg"][1:]
    value = repr(first["input"])
    # A missing field has no value: pydantic reports the whole body as its input.
    is_shown = first["type"] != "missing" and len(value) <= MAX_SHOWN_CHARACTERS
    field = _name_field(first) or "body"
    return f"{field}: {message}{f', got {value}' if is_shown else ''}{more}"


def _name_field(error: Mapping[str, Any]) -> str | None:
    # The first part of the location is always "body".
    return ".".join(str(part) for part in error["loc"][1:]) or None


def _respond(
    status: int,
    message: str,
    *,
    type_: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    # In one line, since messages of libraries may have several.
    error = {"message": " ".join(message.split()), "type": type_, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
