"""The HTTP routes, and one JSON shape for everything that is refused. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from serving.schema import (
    CompleteAnswer,
    CompleteRequest,
    Health,
    InfillAnswer,
    InfillRequest,
    ModelCard,
    Refusal,
)
from serving.service import Service
from ul2r.errors import RequestError

SHOWN_CHARACTERS = 60
"""A refused value longer than this is not repeated to its sender."""
PLAYGROUND = Path(__file__).with_name("playground.html")


def make_api(service: Service) -> FastAPI:
    """The API of one model.

    Every refusal is `{"error": "one line"}`: 400 for malformed JSON and for what the model cannot answer, 422 for a
    field that is unknown, missing, of a wrong type or out of range, 404 and 405 for a wrong address.
    """
    page = PLAYGROUND.read_text(encoding="utf-8")
    api = FastAPI(
        title="UL2R",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses={400: {"model": Refusal}, 422: {"model": Refusal}},
    )

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return page

    @api.get("/healthz")
    async def health() -> Health:
        return Health()

    @api.get("/v1/model")
    async def card() -> ModelCard:
        return service.card()

    @api.post("/v1/complete")
    async def complete(request: CompleteRequest) -> CompleteAnswer:
        return await service.complete(request)

    @api.post("/v1/infill")
    async def infill(request: InfillRequest) -> InfillAnswer:
        return await service.infill(request)

    _add_refusals(api)
    return api


def _add_refusals(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def by_model(_: Request, error: RequestError) -> JSONResponse:
        return _refusal(400, str(error))

    @api.exception_handler(RequestValidationError)
    async def by_schema(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            position, reason = first["loc"][-1], first["ctx"]["error"]
            return _refusal(400, f"malformed JSON at character {position}: {reason}")
        return _refusal(422, _reason(error.errors()))

    @api.exception_handler(HTTPException)
    async def by_address(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers
        )


def _reason(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first error with its field and a short value, and how many more there are."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field, GET /openapi.json lists the known ones{more}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    given = repr(first["input"])
    shown = "" if first["type"] == "missing" or len(given) > SHOWN_CHARACTERS else f", got {given}"
    return f"{field}: {message}{shown}{more}"


def _refusal(status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    refusal = Refusal(error=" ".join(reason.split()))
    return JSONResponse(refusal.model_dump(), status_code=status, headers=headers)
