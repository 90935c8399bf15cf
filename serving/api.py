"""HTTP application of one model: its routes, and pages for people. No Ray here."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.body_limit import BodyLimitMiddleware
from serving.docs_page import render_docs
from serving.editor_routes import add_editor_routes
from serving.errors import add_error_handlers, make_error_response
from serving.gate import Gate, add_gate
from serving.openai_routes import add_openai_routes
from serving.responses import make_headers, respond
from serving.schema import (
    DetokenizeRequest,
    ErrorResponse,
    HealthResponse,
    TokenizeRequest,
)
from serving.service import InferenceService, check_model, run_beside_streams
from ul2r.errors import RequestError
from ul2r.inference.engine import EngineStoppedError
from ul2r.inference.prompts import check_tokens

PLAYGROUND = Path(__file__).with_name("playground.html")


def create_api(service: InferenceService, gate: Gate | None = None) -> FastAPI:
    """Return the API of one model.

    Args:
        service: The model.
        gate: Asked about each request; None lets everything in.

    Every error is OpenAI's error object: 400 for malformed JSON, for a field of the wrong type or out of range, and for
    requests that the model cannot serve, 413 for a body of more than `MAX_BODY_BYTES`, 404 and 405 for a wrong URL,
    method or model, 429 if too many requests wait, 503 if the engine has failed.
    """
    # Read once, at the start: a missing file fails there and not at the first visitor.
    page = PLAYGROUND.read_text(encoding="utf-8")
    api = FastAPI(
        title="UL2R",
        docs_url=None,  # FastAPI's documentation pages load their scripts from a CDN
        redoc_url=None,
        responses={status: {"model": ErrorResponse} for status in (400, 404, 413, 429, 503)},
    )
    api.add_middleware(BodyLimitMiddleware)
    if gate is not None:
        add_gate(api, gate)

    # Handlers are async, so FastAPI runs them in the event loop, not in its thread pool: none of them blocks.
    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return page

    @api.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return render_docs(api.openapi())

    @api.get("/health", responses={200: {"model": HealthResponse}})
    async def health() -> Response:
        """Answer 200 while requests are answered, and 503 otherwise."""
        if not service.engine.is_healthy:
            return make_error_response(EngineStoppedError("the engine has stopped"))
        return JSONResponse({"status": "ok"})

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Show this replica's metrics in Prometheus' format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    add_openai_routes(api, service)
    add_editor_routes(api, service)
    _add_tokenizer_routes(api, service)
    add_error_handlers(api)
    return api


def _add_tokenizer_routes(api: FastAPI, service: InferenceService) -> None:
    @api.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Response:
        """Return the tokens of a text."""
        check_model(service, request.model)
        text = request.prompt if request.prompt is not None else request.content
        if text is None:
            raise RequestError("prompt: give a text")
        tokens = await run_beside_streams(len(text), lambda: service.model.encode(text))
        length = service.model.max_position_embeddings
        body = {"count": len(tokens), "max_model_len": length, "tokens": tokens}
        return respond(body, make_headers(request))

    @api.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Response:
        """Return the text of tokens."""
        check_model(service, request.model)
        text = service.model.decode(check_tokens(service.model, request.tokens))
        return respond({"prompt": text, "content": text}, make_headers(request))
