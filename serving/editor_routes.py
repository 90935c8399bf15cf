"""Infilling: this project's own route with several slots, and those of editors, by Mistral and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from fastapi import FastAPI
from fastapi.responses import Response

from serving.answers import Delta, Event, Final
from serving.openai_routes import describe_chat_event, make_settings
from serving.responses import (
    OR_STREAM,
    Json,
    count_usage,
    make_envelope,
    make_headers,
    respond,
    respond_with_stream,
)
from serving.schema import FimRequest, InfillRequest, InfillResponse, LlamaInfillRequest
from serving.service import InferenceService, Job, check_model, run_beside_streams
from ul2r.errors import RequestError
from ul2r.inference.prompts import Prompt, prepare_completion, prepare_infilling


def add_editor_routes(api: FastAPI, service: InferenceService) -> None:
    """Add the routes of one model."""

    @api.post("/v1/infill", responses={200: {"model": InfillResponse, **OR_STREAM[200]}})
    async def infill(request: InfillRequest) -> Response:
        """Fill each slot in a prompt."""
        return await _answer_infill(service, request)

    @api.post("/v1/fim/completions", responses=OR_STREAM)
    async def complete_as_mistral(request: FimRequest) -> Response:
        """Fill the gap between `prompt` and `suffix`; answers have the form of Mistral's API."""
        return await _answer_fim(service, request)

    @api.post("/infill", responses=OR_STREAM)
    async def infill_as_llama(request: LlamaInfillRequest) -> Response:
        """Fill the gap between `input_prefix` and `input_suffix`; answers have the form of llama.cpp's server."""
        return await _answer_llama(service, request)


async def _answer_infill(service: InferenceService, request: InfillRequest) -> Response:
    check_model(service, request.model)
    # n slots divide the text into n + 1 parts.
    parts = request.prompt.split(request.slot)
    if len(parts) == 1:
        raise RequestError(f"the prompt has no slot: mark each place to fill with {request.slot}")
    prompt = await run_beside_streams(
        len(request.prompt),
        lambda: prepare_infilling(
            service.model, parts, mode=request.mode, max_tokens=request.max_tokens
        ),
    )
    jobs = [Job(prompt, make_settings(request), timeout_s=request.timeout_s)]
    envelope = make_envelope(service, "infilling", "infill")
    headers = make_headers(request)

    def describe_end(final: Final) -> Json:
        texts = zip_longest(parts, final.fills, fillvalue="")
        return {
            **envelope,
            "text": "".join(text for pair in texts for text in pair),
            "fills": list(final.fills),
            "finish_reasons": list(final.outcome.finish_reasons),
            "usage": count_usage(jobs, [final]),
        }

    if not request.stream:
        (final,) = await service.answer(jobs)
        return respond(describe_end(final), headers)

    def describe(event: Event) -> Iterable[Json]:
        if isinstance(event, Delta):
            yield {**envelope, "slot": event.span, "text": event.text}
        elif isinstance(event, Final):
            yield describe_end(event)

    return await respond_with_stream(service, jobs, describe, headers=headers)


async def _answer_fim(service: InferenceService, request: FimRequest) -> Response:
    check_model(service, request.model)
    num_characters = len(request.prompt) + len(request.suffix or "")
    prompt = await run_beside_streams(num_characters, lambda: _prepare_fim(service, request))
    if request.random_seed is not None:
        request = request.model_copy(update={"seed": request.random_seed})
    jobs = [
        Job(
            prompt,
            make_settings(request),
            stop=tuple(request.stop or ()),
            min_tokens=request.min_tokens or 0,
            timeout_s=request.timeout_s,
        )
    ]
    headers = make_headers(request)

    if not request.stream:
        (final,) = await service.answer(jobs)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": final.fills[0], "tool_calls": None},
            "finish_reason": final.outcome.finish_reasons[0],
        }
        envelope = make_envelope(service, "chat.completion", "fim")
        usage = count_usage(jobs, [final])
        return respond({**envelope, "choices": [choice], "usage": usage}, headers)

    envelope = make_envelope(service, "chat.completion.chunk", "fim")
    return await respond_with_stream(
        service,
        jobs,
        lambda event: describe_chat_event(envelope, event),
        headers=headers,
        # Mistral's streams always end with the usage.
        last=lambda finals: [{**envelope, "choices": [], "usage": count_usage(jobs, finals)}],
    )


def _prepare_fim(service: InferenceService, request: FimRequest) -> Prompt:
    if not request.suffix:
        return prepare_completion(
            service.model, request.prompt, mode=request.mode, max_tokens=request.max_tokens
        )
    return prepare_infilling(
        service.model,
        [request.prompt, request.suffix],
        mode=request.mode or "NLU",
        max_tokens=request.max_tokens,
    )


async def _answer_llama(service: InferenceService, request: LlamaInfillRequest) -> Response:
    check_model(service, request.model)
    extra = "".join(
        f"{text.get('filename', '')}\n{text.get('text', '')}\n"
        for text in request.input_extra or ()
    )
    limit = None if request.n_predict == -1 else request.n_predict
    prompt = await run_beside_streams(
        len(extra) + len(request.input_prefix) + len(request.input_suffix) + len(request.prompt),
        lambda: prepare_infilling(
            service.model,
            [extra + request.input_prefix, request.input_suffix],
            mode=request.mode or "NLU",
            max_tokens=limit,
            typed=request.prompt,
        ),
    )
    timeout_s = request.timeout_s
    if request.t_max_predict_ms:
        timeout_s = request.t_max_predict_ms / 1000
    jobs = [
        Job(
            prompt,
            make_settings(request),
            stop=tuple(request.stop or ()),
            timeout_s=timeout_s,
        )
    ]
    headers = make_headers(request)

    def describe_end(final: Final, content: str) -> Json:
        outcome = final.outcome
        stop_type = "limit" if outcome.finish_reasons[0] == "length" else "eos"
        if final.stop_text is not None:
            stop_type = "word"
        return {
            "content": content,
            "stop": True,
            "stop_type": stop_type,
            "stopping_word": final.stop_text or "",
            "model": service.model_id,
            "tokens_evaluated": outcome.prompt_tokens,
            "tokens_cached": outcome.prompt_tokens if outcome.cached else 0,
            "tokens_predicted": outcome.completion_tokens,
            "truncated": False,
        }

    if not request.stream:
        (final,) = await service.answer(jobs)
        return respond(describe_end(final, final.fills[0]), headers)

    def describe(event: Event) -> Iterable[Json]:
        if isinstance(event, Delta):
            yield {"content": event.text, "stop": False}
        elif isinstance(event, Final):
            yield describe_end(event, "")

    return await respond_with_stream(service, jobs, describe, headers=headers, is_done_marked=False)
