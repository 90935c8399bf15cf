"""Requests and responses of the HTTP API.

Only shapes and types are validated here. Checks that depend on the model (its modes, slots and maximum length) are in
`ul2r.inference`, where the model is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.body_limit import MAX_PROMPT_CHARACTERS
from ul2r.config.denoisers import Mode
from ul2r.inference import FinishReason

# Wide bounds, the same for every model: what a model allows is checked in `ul2r.inference`.
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
MaxTokens = Annotated[int, Field(le=1_000_000)]
Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class GenerationRequest(BaseModel):
    """Base of request bodies: no type coercion, unknown fields are errors."""

    # strict: "8" is not converted to 8. A client's mistake is reported instead of guessed at.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/complete."""

    prompt: Prompt
    mode: Mode | None = None
    """Default: S2S for a model trained on denoisers, none for a causal one."""
    max_tokens: MaxTokens | None = None
    """Maximum number of tokens to generate. Default: 64, or fewer where the model's maximum length leaves fewer."""
    temperature: Temperature = 0.0
    seed: Seed = 0


class InfillRequest(GenerationRequest):
    """Body of POST /v1/infill."""

    prompt: Prompt
    """Text in which each `slot` marks a place to fill."""
    slot: str = Field(default="<slot>", min_length=1, max_length=100)
    """Marker of a slot; choose another one if the text itself contains "<slot>"."""
    mode: Literal["NLU", "NLG"] = "NLU"
    max_tokens: MaxTokens | None = None
    """Maximum number of tokens per slot. Default: 64, or fewer where the model's maximum length leaves fewer."""
    temperature: Temperature = 0.0
    seed: Seed = 0


class ModelIdentity(BaseModel):
    """Training run that a model comes from."""

    run: str
    role: str | None
    step: int | None


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    """Tokens read, including mode and sentinels."""
    completion_tokens: int
    """Tokens generated, including sentinels and end of text."""


class GenerationResponse(BaseModel):
    """Fields that all generated responses share."""

    model: ModelIdentity
    usage: Usage


class CompletionResponse(GenerationResponse):
    """Response of POST /v1/complete."""

    text: str
    """Continuation without the prompt."""
    finish_reason: FinishReason


class InfillResponse(GenerationResponse):
    """Response of POST /v1/infill."""

    text: str
    """Prompt with its slots filled."""
    fills: list[str]
    """Text of each slot."""
    finish_reasons: list[FinishReason]
    """Finish reason of each slot."""


class ModelLimits(BaseModel):
    """Largest requests that the model accepts."""

    max_model_len: int
    """Maximum number of tokens of prompt and completion together."""
    max_slots: int
    """Maximum number of slots in a prompt; 0 if the model cannot infill."""
    default_max_tokens: int


class ModelInfo(ModelIdentity):
    """Response of GET /v1/model."""

    attention: Literal["prefix", "causal"]
    modes: list[str]
    """Modes that a request may name."""
    tokens: int | None
    """Training tokens, including those of the parent runs."""
    flops: float | None
    """Training FLOPs, including those of the parent runs."""
    limits: ModelLimits


class HealthResponse(BaseModel):
    """Response of GET /healthz."""

    status: Literal["ok"] = "ok"


class ErrorResponse(BaseModel):
    """Response to a bad request, with an HTTP status of 4xx."""

    error: str
    """One line: the problem and its solution."""
