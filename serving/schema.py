"""Requests of the HTTP API, by the names of those whose clients send them, and shapes of its responses.

Only shapes and types are validated here. Checks that depend on the model (its modes, slots and maximum length) are in
`ul2r.inference`, where the model is. A field that is null counts as not given. Unknown fields are kept apart
(`unknown_fields`): they are ignored, and named in a header of the response.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.body_limit import MAX_PROMPT_CHARACTERS
from ul2r.config.denoisers import Mode
from ul2r.inference import FinishReason

MAX_PROMPTS = 256
"""Prompts in a request."""
MAX_CHOICES = 128
DEFAULT_SLOT = "<slot>"
MAX_STOPS = 32
"""Continue sends up to 19 for some languages."""
MAX_LOGPROBS = 20

# Wide bounds, the same for every model: what a model allows is checked in `ul2r.inference`.
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Tokens = Annotated[list[int], Field(max_length=MAX_PROMPT_CHARACTERS)]
Prompts = (
    Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
)
MaxTokens = Annotated[int, Field(le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


def _to_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    StopTexts | None,
    BeforeValidator(_to_list, json_schema_input_type=StopText | StopTexts | None),
]


class Request(BaseModel):
    """Base of request bodies: no type coercion."""

    # strict: "8" is not converted to 8. A client's mistake is reported instead of guessed at.
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    @property
    def unknown_fields(self) -> list[str]:
        """Names of fields that nobody reads."""
        return sorted(self.model_extra or {})


class SamplingRequest(Request):
    """Fields that all requests for generated text share."""

    model: str | None = None
    """Name of the served model, or null."""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    """Default: 0, the most likely token."""
    top_p: float | None = None
    top_k: int | None = None
    """Default: 0, all tokens; -1 is the same."""
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token ids, written as strings, and what is added to their logits."""
    seed: Seed | None = None
    """Default: another one in each request."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds after which the answer ends as it is."""


class StreamOptions(BaseModel):
    """Options of a stream, as OpenAI's."""

    include_usage: bool = False


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    """A text, its tokens, or a list of those."""
    suffix: Text | None = None
    """Text behind the gap that is filled."""
    mode: Mode | None = None
    """Default: of a model trained on denoisers, S2S, and NLU with a suffix."""
    max_tokens: MaxTokens | None = None
    """Default: 64, or fewer where the model's maximum length leaves fewer."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    stop: Stop = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    prefix_tokens: Annotated[int, Field(ge=1)] | None = None
    """With `echo` and `logprobs`: tokens that are the context; those of the prompt behind them are scored."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    mode: Mode | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class FimRequest(SamplingRequest):
    """Body of POST /v1/fim/completions, as Mistral's."""

    prompt: Text
    suffix: Text | None = None
    mode: Mode | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    random_seed: Seed | None = None
    stop: Stop = None
    stream: bool | None = None


class LlamaInfillRequest(SamplingRequest):
    """Body of POST /infill, as llama.cpp's server has it."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: list[dict[str, str]] | None = None
    """Other texts, with "filename" and "text", that are put before the prefix."""
    prompt: Text = ""
    """Text already typed behind the prefix: the answer continues it."""
    mode: Literal["NLU", "NLG"] | None = None
    n_predict: MaxTokens | None = None
    """-1 is the default."""
    stop: Stop = None
    stream: bool | None = None
    t_max_predict_ms: Annotated[float, Field(ge=0)] | None = None


class InfillRequest(SamplingRequest):
    """Body of POST /v1/infill."""

    prompt: Text
    """Text in which each `slot` marks a place to fill."""
    slot: str = Field(default=DEFAULT_SLOT, min_length=1, max_length=100)
    """Marker of a slot; choose another one if the text itself contains "<slot>"."""
    mode: Literal["NLU", "NLG"] = "NLU"
    max_tokens: MaxTokens | None = None
    """Maximum number of tokens per slot. Default: 64, or fewer where the model's maximum length leaves fewer."""
    stream: bool | None = None


class TokenizeRequest(Request):
    """Body of POST /tokenize: "prompt" as vLLM's clients send it, or "content" as llama.cpp's."""

    model: str | None = None
    prompt: Text | None = None
    content: Text | None = None


class DetokenizeRequest(Request):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Tokens


class PromptTokensDetails(BaseModel):
    """Details of `Usage.prompt_tokens`."""

    cached_tokens: int
    """Tokens of prompts that had been read before."""


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    """Tokens read, including mode and sentinels; those of one prompt count once, whatever `n`."""
    completion_tokens: int
    """Tokens generated, including sentinels and end of text."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class InfillResponse(BaseModel):
    """Response of POST /v1/infill."""

    id: str
    object: Literal["infilling"] = "infilling"
    created: int
    model: str
    text: str
    """Prompt with its slots filled."""
    fills: list[str]
    """Text of each slot."""
    finish_reasons: list[FinishReason]
    """Finish reason of each slot."""
    usage: Usage


class ModelCard(BaseModel):
    """A served model; the fields after `owned_by` are not OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ul2r"] = "ul2r"
    max_model_len: int
    """Maximum number of tokens of prompt and completion together."""
    max_slots: int
    """Maximum number of slots in a prompt; 0 if the model cannot infill."""
    default_max_tokens: int
    attention: Literal["prefix", "causal"]
    modes: list[str]
    """Modes that a request may name."""
    role: str | None
    step: int | None
    tokens: int | None
    """Training tokens, including those of the parent runs."""
    examples: list[str]
    """Prompts that the model answers well, with `<slot>` where it fills; empty if none were chosen."""
    flops: float | None
    """Training FLOPs, including those of the parent runs."""


class ModelList(BaseModel):
    """Response of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthResponse(BaseModel):
    """Response of GET /health."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """An error, as OpenAI's clients read it."""

    message: str
    """One line: the problem and its solution."""
    type: str
    param: str | None
    """Field of the request that is wrong."""
    code: str | None


class ErrorResponse(BaseModel):
    """Response to a request that is not answered."""

    error: ErrorDetail
