"""OpenAI's routes: completions, with infilling by `suffix`, chat completions, and the list of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import Response

from serving.answers import Delta, Event, Final
from serving.errors import MAX_SHOWN_CHARACTERS
from serving.responses import (
    OR_STREAM,
    Json,
    count_usage,
    describe_chat_logprobs,
    describe_echoed_logprobs,
    describe_logprobs,
    make_envelope,
    make_headers,
    respond,
    respond_with_stream,
)
from serving.schema import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    SamplingRequest,
    StreamOptions,
)
from serving.service import InferenceService, Job, check_model, draw_seed, run_beside_streams
from ul2r.errors import RequestError
from ul2r.inference import DEFAULT_MAX_TOKENS
from ul2r.inference.prompts import prepare_completion, prepare_infilling
from ul2r.inference.sampling import SamplingSettings

if TYPE_CHECKING:
    from ul2r.inference.prompts import Prompt


def add_openai_routes(api: FastAPI, service: InferenceService) -> None:
    """Add the routes of one model."""

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[describe_model(service)])

    @api.get("/v1/models/{name:path}")
    async def show_model(name: str) -> ModelCard:
        check_model(service, name)
        return describe_model(service)

    @api.post("/v1/completions", responses=OR_STREAM)
    async def complete(request: CompletionRequest) -> Response:
        """Continue prompts, or fill the gap between `prompt` and `suffix`."""
        return await answer_completion(service, request)

    @api.post("/beta/completions", responses=OR_STREAM)
    async def complete_as_deepseek(request: CompletionRequest) -> Response:
        """Do what /v1/completions does, at DeepSeek's address."""
        return await answer_completion(service, request)

    @api.post("/v1/chat/completions", responses=OR_STREAM)
    async def chat(request: ChatRequest) -> Response:
        """Answer a conversation, written out by the tokenizer's template."""
        return await _answer_chat(service, request)


def describe_model(service: InferenceService) -> ModelCard:
    """Return the model's description and limits."""
    model = service.model
    metadata = model.metadata
    # A causal model's tokenizer has modes as well, but the model was never trained on them.
    has_modes = service.max_slots and metadata.vocabulary
    return ModelCard(
        id=service.model_id,
        created=service.created,
        max_model_len=model.max_position_embeddings,
        max_slots=service.max_slots,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        attention=metadata.attention,
        modes=sorted(metadata.vocabulary.modes) if has_modes and metadata.vocabulary else [],
        role=metadata.role,
        step=metadata.step,
        tokens=metadata.tokens,
        flops=metadata.flops,
        examples=list(service.examples),
    )


def make_settings(request: SamplingRequest) -> SamplingSettings:
    """Return the sampling settings of a request.

    Raises:
        RequestError: If a key of `logit_bias` is no number.
    """
    bias = dict[int, float]()
    for token, value in (request.logit_bias or {}).items():
        # Python reads no number of thousands of digits, and no vocabulary needs more than ten.
        if not token.isdecimal() or not token.isascii() or len(token) > 10:
            shown = repr(token) if len(token) <= MAX_SHOWN_CHARACTERS else "a long text"
            raise RequestError(f"logit_bias: {shown} is no token id: write a number in quotes")
        bias[int(token)] = value
    return SamplingSettings(
        temperature=request.temperature or 0.0,
        top_k=0 if request.top_k == -1 else request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=(
            1.0 if request.repetition_penalty is None else request.repetition_penalty
        ),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        seed=draw_seed() if request.seed is None else request.seed,
    )


async def answer_completion(service: InferenceService, request: CompletionRequest) -> Response:
    """Return the response to a completion request."""
    check_model(service, request.model)
    _check_honored(request, service)
    texts = list_prompts(request.prompt)
    settings = make_settings(request)
    num_characters = sum(map(len, texts)) + len(request.suffix or "")
    prompts = await run_beside_streams(
        num_characters, lambda: [_prepare(service, request, text) for text in texts]
    )
    jobs = [
        Job(
            prompt=prompt,
            settings=settings,
            num_choices=request.n or 1,
            stop=tuple(request.stop or ()),
            num_logprobs=request.logprobs,
            min_tokens=request.min_tokens or 0,
            timeout_s=request.timeout_s,
        )
        for prompt in prompts
    ]
    echoes = [
        _echo(service, text) if request.echo else ""
        for text in texts
        for _ in range(request.n or 1)
    ]
    envelope = make_envelope(service, "text_completion", "cmpl")
    headers = make_headers(request)

    if not request.stream:
        finals = await service.answer(jobs)
        choices = [
            {
                "index": final.choice,
                "text": echoes[final.choice] + final.fills[0],
                "finish_reason": final.outcome.finish_reasons[0],
                "logprobs": _describe_logprobs(service, request, jobs, echoes, final),
            }
            for final in finals
        ]
        return respond(
            {**envelope, "choices": choices, "usage": count_usage(jobs, finals)}, headers
        )

    def describe(event: Event) -> Iterable[Json]:
        choice: Json = {"text": "", "finish_reason": None, "logprobs": None}
        if isinstance(event, Delta):
            choice |= {"index": event.choice, "text": event.text}
            if event.tokens:
                choice["logprobs"] = describe_logprobs(event.tokens, len(echoes[event.choice]))
        elif isinstance(event, Final):
            choice |= {
                "index": event.choice,
                "finish_reason": event.outcome.finish_reasons[0],
            }
        yield {**envelope, "choices": [choice]}

    first = [
        {
            **envelope,
            "choices": [{"index": i, "text": echo, "finish_reason": None, "logprobs": None}],
        }
        for i, echo in enumerate(echoes)
        if echo
    ]
    return await respond_with_stream(
        service,
        jobs,
        describe,
        headers=headers,
        first=first,
        last=lambda finals: make_usage_chunk(envelope, request.stream_options, jobs, finals),
    )


def make_usage_chunk(
    envelope: Json,
    options: StreamOptions | None,
    jobs: Sequence[Job],
    finals: Sequence[Final],
) -> Iterable[Json]:
    """Yield the last chunk of a stream whose request asks for its usage."""
    if options is not None and options.include_usage:
        yield {**envelope, "choices": [], "usage": count_usage(jobs, finals)}


def list_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """Return the prompts of a request: a text, its tokens, or a list of those."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt or [""]


def _check_honored(request: CompletionRequest, service: InferenceService) -> None:
    """Refuse what would be answered with something else than it asks for.

    Raises:
        RequestError: If there is such a field.
    """
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError(
            f"best_of={request.best_of}: answers are not ranked here: leave it out, and use n and logprobs"
        )
    if request.echo and request.suffix:
        raise RequestError("echo with suffix: the prompt is not one text: leave echo out")
    is_scored = request.echo and request.logprobs is not None
    if request.prefix_tokens is not None and not is_scored:
        raise RequestError("prefix_tokens: give it with echo and logprobs, or leave it out")
    if is_scored and request.stream:
        raise RequestError("echo with logprobs and stream: scores come at once: leave stream out")
    if is_scored and request.prefix_tokens is None and service.model.attention == "prefix":
        raise RequestError(
            "echo with logprobs: the log probabilities of a prompt are undefined where its tokens see each other in "
            "both directions: give prefix_tokens, the number of tokens that are context; the others are scored"
        )


def _describe_logprobs(
    service: InferenceService,
    request: CompletionRequest,
    jobs: Sequence[Job],
    echoes: Sequence[str],
    final: Final,
) -> Json | None:
    if request.logprobs is None:
        return None
    if not request.echo:
        return describe_logprobs(final.tokens)
    job = jobs[final.choice // (request.n or 1)]
    return describe_echoed_logprobs(service.model, job.prompt, echoes[final.choice], final.tokens)


def _prepare(
    service: InferenceService, request: CompletionRequest, text: str | list[int]
) -> Prompt:
    if not request.suffix:
        prefix_tokens = request.prefix_tokens
        # A causal model's first token is a prefix of its own: it has no probability.
        if request.echo and request.logprobs is not None and prefix_tokens is None:
            prefix_tokens = 1
        return prepare_completion(
            service.model,
            text,
            mode=request.mode,
            max_tokens=request.max_tokens,
            prefix_tokens=prefix_tokens,
        )
    if not isinstance(text, str):
        raise RequestError("suffix with a prompt of tokens: give the prompt as text")
    return prepare_infilling(
        service.model,
        [text, request.suffix],
        mode=request.mode or "NLU",
        max_tokens=request.max_tokens,
    )


def _echo(service: InferenceService, text: str | list[int]) -> str:
    return text if isinstance(text, str) else service.model.decode(text)


async def _answer_chat(service: InferenceService, request: ChatRequest) -> Response:
    check_model(service, request.model)
    num_characters = sum(len(_join_content(message.content)) for message in request.messages)
    jobs = [await run_beside_streams(num_characters, lambda: _prepare_chat(service, request))]
    headers = make_headers(request)

    if not request.stream:
        finals = await service.answer(jobs)
        envelope = make_envelope(service, "chat.completion", "chatcmpl")
        choices = [
            {
                "index": final.choice,
                "message": {"role": "assistant", "content": final.fills[0], "refusal": None},
                "finish_reason": final.outcome.finish_reasons[0],
                "logprobs": describe_chat_logprobs(final.tokens) if request.logprobs else None,
            }
            for final in finals
        ]
        return respond(
            {**envelope, "choices": choices, "usage": count_usage(jobs, finals)}, headers
        )

    envelope = make_envelope(service, "chat.completion.chunk", "chatcmpl")
    return await respond_with_stream(
        service,
        jobs,
        lambda event: describe_chat_event(envelope, event),
        headers=headers,
        first=[
            {
                **envelope,
                "choices": [
                    {
                        "index": choice,
                        "delta": {"role": "assistant", "content": ""},
                        "finish_reason": None,
                        "logprobs": None,
                    }
                ],
            }
            for choice in range(request.n or 1)
        ],
        last=lambda finals: make_usage_chunk(envelope, request.stream_options, jobs, finals),
    )


def describe_chat_event(envelope: Json, event: Event) -> Iterable[Json]:
    """Yield the chunk of an event, in the form of chat completions."""
    choice: Json = {"delta": {}, "finish_reason": None, "logprobs": None}
    if isinstance(event, Delta):
        choice |= {"index": event.choice, "delta": {"content": event.text}}
        if event.tokens:
            choice["logprobs"] = describe_chat_logprobs(event.tokens)
    elif isinstance(event, Final):
        choice |= {"index": event.choice, "finish_reason": event.outcome.finish_reasons[0]}
    yield {**envelope, "choices": [choice]}


def _prepare_chat(service: InferenceService, request: ChatRequest) -> Job:
    """Return the prompt of a conversation.

    Raises:
        RequestError: If the tokenizer has no template, or it refuses the conversation.
    """
    if request.tools or (request.response_format or {"type": "text"}).get("type") != "text":
        raise RequestError("tools and response_format are not supported: leave them out")
    if service.chat_template is None:
        raise RequestError(
            f"{service.model_id!r} has no chat template: send a prompt to /v1/completions"
        )
    messages = [
        {**message.model_dump(exclude_none=True), "content": _join_content(message.content)}
        for message in request.messages
    ]
    tokens = service.chat_template.encode(messages)
    limit = request.max_completion_tokens
    num_logprobs = request.top_logprobs or 0
    return Job(
        prompt=prepare_completion(
            service.model,
            tokens,
            mode=request.mode,
            max_tokens=request.max_tokens if limit is None else limit,
        ),
        settings=make_settings(request),
        num_choices=request.n or 1,
        stop=tuple(request.stop or ()),
        num_logprobs=num_logprobs if request.logprobs else None,
        timeout_s=request.timeout_s,
    )


def _join_content(content: str | list[dict[str, Any]] | None) -> str:
    """Return the text of a message; OpenAI's clients may send it in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"messages: content of type {part.get('type')!r} is no text")
    return "".join(part["text"] for part in content)
