"""Responses of generated text: at once, or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from serving.answers import Event, Final, TokenText
from serving.errors import make_error_response
from serving.schema import Request
from serving.service import InferenceService, Job
from ul2r.errors import RequestError

if TYPE_CHECKING:
    from ul2r.inference import LanguageModel
    from ul2r.inference.prompts import Prompt

IGNORED_FIELDS_HEADER = "x-ignored-fields"
Json = dict[str, Any]
OR_STREAM: dict[int | str, Json] = {200: {"content": {"text/event-stream": {}}}}
"""Entry in the OpenAPI schema of a route that can also stream."""


def make_headers(request: Request) -> dict[str, str]:
    """Return the header that names the fields of a request that nobody reads."""
    names = [name for name in request.unknown_fields if name.isascii() and name.isprintable()]
    return {IGNORED_FIELDS_HEADER: ", ".join(names)[:1000]} if names else {}


def make_envelope(service: InferenceService, kind: str, prefix: str) -> Json:
    """Return the fields that every response and every chunk of a stream begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_id,
    }


def count_usage(jobs: Sequence[Job], finals: Iterable[Final]) -> Json:
    """Return the `Usage` of a request."""
    finals = sorted(finals, key=lambda final: final.choice)
    prompt_tokens = sum(len(job.prompt.tokens) + len(job.prompt.forced) for job in jobs)
    completion_tokens = sum(final.outcome.completion_tokens for final in finals)
    # The first choice of each prompt: the others always find what it has read.
    cached_tokens = 0
    place = 0
    for job in jobs:
        first = finals[place].outcome
        cached_tokens += first.prompt_tokens if first.cached else 0
        place += job.num_choices
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def describe_logprobs(tokens: Sequence[TokenText], offset: int = 0) -> Json:
    """Return log probabilities in the form of completions; `offset` is added to places of tokens."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprobs.logprob for token in tokens],
        "top_logprobs": [_describe_top(token) for token in tokens],
        "text_offset": [offset + token.offset for token in tokens],
    }


def describe_echoed_logprobs(
    model: LanguageModel, prompt: Prompt, echo: str, tokens: Sequence[TokenText]
) -> Json:
    """Return log probabilities of a prompt and its answer; what the model reads as its prefix has none.

    Args:
        model: Decodes tokens.
        prompt: The prompt.
        echo: Its text.
        tokens: Its scored tokens, and those of the answer.
    """
    prefix = prompt.parts[0]
    scored = tokens[: len(prompt.forced)]
    texts = [model.decode_continuation(prefix[:i], prefix[i : i + 1]) for i in range(len(prefix))]
    texts += [token.text for token in scored]
    ends = accumulate((len(text) for text in texts), initial=0)
    missing = [None] * len(prefix)
    answer = describe_logprobs(tokens[len(prompt.forced) :], len(echo))
    known = describe_logprobs(scored)
    return {
        "tokens": texts + answer["tokens"],
        "token_logprobs": [*missing, *known["token_logprobs"], *answer["token_logprobs"]],
        "top_logprobs": [*missing, *known["top_logprobs"], *answer["top_logprobs"]],
        # Bytes of a character that are tokens of their own are decoded to a sign each.
        "text_offset": [min(end, len(echo)) for end in list(ends)[:-1]] + answer["text_offset"],
    }


def _describe_top(token: TokenText) -> dict[str, float]:
    """Return the log probabilities of the most likely tokens, and of the sampled one in any case, by their texts."""
    top = dict[str, float]()
    for text, (_, logprob) in zip(token.top_texts, token.logprobs.top, strict=True):
        # Several tokens may have a text, such as parts of a character: the most likely comes first.
        top.setdefault(text, logprob)
    top.setdefault(token.text, token.logprobs.logprob)
    return top


def describe_chat_logprobs(tokens: Sequence[TokenText]) -> Json:
    """Return log probabilities in the form of chat completions."""

    def describe(text: str, logprob: float) -> Json:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {
                **describe(token.text, token.logprobs.logprob),
                "top_logprobs": [
                    describe(text, logprob)
                    for text, (_, logprob) in zip(token.top_texts, token.logprobs.top, strict=True)
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


async def respond_with_stream(
    service: InferenceService,
    jobs: Sequence[Job],
    describe: Callable[[Event], Iterable[Json]],
    *,
    headers: Mapping[str, str],
    last: Callable[[Sequence[Final]], Iterable[Json]] = lambda _: (),
    first: Iterable[Json] = (),
    is_done_marked: bool = True,
) -> Response:
    """Return a stream of events; its first one is waited for, so that a refusal has its status.

    Args:
        service: Answers.
        jobs: The prompts.
        describe: Makes the chunks of an event.
        headers: Of the response.
        last: Makes the chunks after all answers.
        first: Chunks before all answers.
        is_done_marked: True if `data: [DONE]` ends the stream.
    """
    events = service.stream(jobs)
    event: Event | None = await anext(events)

    async def write() -> AsyncIterator[bytes]:
        nonlocal event
        finals = list[Final]()
        # Closed when the client goes away, too, which cancels this generator.
        async with aclosing(events):
            for chunk in first:
                yield encode_event(chunk)
            try:
                while event is not None:
                    if isinstance(event, Final):
                        finals.append(event)
                    for chunk in describe(event):
                        yield encode_event(chunk)
                    event = await anext(events, None)
                for chunk in last(finals):
                    yield encode_event(chunk)
            except RequestError as error:
                # The status has been sent: OpenAI's clients raise an error for such a chunk.
                yield encode_event(json.loads(bytes(make_error_response(error).body)))
            if is_done_marked:
                yield b"data: [DONE]\n\n"

    return StreamingResponse(
        write(),
        media_type="text/event-stream",
        # A proxy in between must not collect the events.
        headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
    )


def encode_event(chunk: Json) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def respond(body: Json, headers: Mapping[str, str]) -> Response:
    """Return a response in JSON."""
    return JSONResponse(body, headers=dict(headers))
