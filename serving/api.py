"""HTTP routes, and one JSON shape for all errors. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from serving.body_limit import BodyLimitMiddleware
from serving.schema import (
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    HealthResponse,
    InfillRequest,
    InfillResponse,
    ModelInfo,
)
from serving.service import InferenceService
from ul2r.errors import RequestError

MAX_SHOWN_CHARACTERS = 60
"""Longer values are not repeated in an error message."""
PLAYGROUND = Path(__file__).with_name("playground.html")


def create_api(service: InferenceService) -> FastAPI:
    """Return the API of one model.

    Every error is `{"error": "one line"}`: 400 for malformed JSON and for requests that the model cannot serve, 413
    for a body of more than `MAX_BODY_BYTES`, 422 for a field that is unknown, missing, of the wrong type or out of
    range, 404 and 405 for a wrong URL or method.
    """
    # Read once, at the start: a missing file fails there and not at the first visitor.
    page = PLAYGROUND.read_text(encoding="utf-8")
    api = FastAPI(
        title="UL2R",
        docs_url=None,  # FastAPI's documentation pages load their scripts from a CDN
        redoc_url=None,
        responses={status: {"model": ErrorResponse} for status in (400, 413, 422)},
    )
    api.add_middleware(BodyLimitMiddleware)

    # Handlers are async, so FastAPI runs them in the event loop, not in its thread pool: none of them blocks.
    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return page

    @api.get("/healthz")
    async def health() -> HealthResponse:
        return HealthResponse()

    @api.get("/v1/model")
    async def model_info() -> ModelInfo:
        return service.model_info()

    @api.post("/v1/complete")
    async def complete(request: CompletionRequest) -> CompletionResponse:
        return await service.complete(request)

    @api.post("/v1/infill")
    async def infill(request: InfillRequest) -> InfillResponse:
        return await service.infill(request)

    _add_error_handlers(api)
    return api


def _add_error_handlers(api: FastAPI) -> None:
    # They replace FastAPI's own handlers, whose bodies have another shape: {"detail": ...}.
    @api.exception_handler(RequestError)
    async def handle_request_error(_: Request, error: RequestError) -> JSONResponse:
        return _error_response(400, str(error))

    @api.exception_handler(RequestValidationError)
    async def handle_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # The body is not JSON at all: FastAPI reports this, too, as a validation error.
        if first["type"] == "json_invalid":
            position = first["loc"][-1]
            reason = first["ctx"]["error"]
            return _error_response(400, f"malformed JSON at character {position}: {reason}")
        return _error_response(422, _describe(error.errors()))

    # Starlette's class: the router raises it for 404 and 405, and FastAPI's own derives from it.
    @api.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error_response(error.status_code, message, error.headers)


def _describe(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the first validation error with its field and value, and the number of further ones."""
    first = errors[0]
    # The first part of the location is always "body".
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field, see GET /openapi.json for the known ones{more}"

    message = first["msg"][:1].lower() + first["msg"][1:]
    value = repr(first["input"])
    # A missing field has no value: pydantic reports the whole body as its input.
    is_shown = first["type"] != "missing" and len(value) <= MAX_SHOWN_CHARACTERS
    return f"{field}: {message}{f', got {value}' if is_shown else ''}{more}"


def _error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    # In one line, since messages of libraries may have several.
    body = ErrorResponse(error=" ".join(message.split()))
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)
