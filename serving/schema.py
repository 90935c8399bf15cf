"""What the HTTP API takes and gives, as pydantic models.

Only shape and type are checked here. What depends on the model (slots, tokens, modes it was trained on) is checked
where the model is, by `ul2r.inference`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ul2r.config.denoisers import Mode
from ul2r.inference import Finish

MAX_CHARACTERS = 1_000_000
"""A prompt beyond this is refused before it is tokenised."""

Prompt = Annotated[str, Field(max_length=MAX_CHARACTERS)]
MaxTokens = Annotated[int, Field(le=1_000_000)]
Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Request(BaseModel):
    """A request body: JSON types are taken as they are, an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CompleteRequest(Request):
    """Body of POST /v1/complete."""

    prompt: Prompt
    mode: Mode | None = None
    """Without it S2S for a model trained on denoisers, none for a causal one."""
    max_tokens: MaxTokens | None = None
    """Most tokens of the answer; without it 64, or what there is room for."""
    temperature: Temperature = 0.0
    seed: Seed = 0


class InfillRequest(Request):
    """Body of POST /v1/infill."""

    prompt: Prompt
    """Text in which each `slot` marks a place to fill."""
    slot: str = Field(default="<slot>", min_length=1, max_length=100)
    """The marker; another one serves where the text itself holds "<slot>"."""
    mode: Literal["NLU", "NLG"] = "NLU"
    max_tokens: MaxTokens | None = None
    """Most tokens in each slot; without it 64, or what there is room for."""
    temperature: Temperature = 0.0
    seed: Seed = 0


class ModelName(BaseModel):
    """Which model answered."""

    run: str
    role: str | None
    step: int | None


class Answer(BaseModel):
    """What every answer states."""

    model: ModelName
    tokens_in: int
    """Tokens read, mode and sentinels included."""
    tokens_out: int
    """Tokens generated, sentinels and eos included."""


class CompleteAnswer(Answer):
    """Answer of POST /v1/complete."""

    text: str
    """The continuation, without the prompt."""
    finish: Finish


class InfillAnswer(Answer):
    """Answer of POST /v1/infill."""

    text: str
    """The prompt with its slots filled."""
    fills: list[str]
    finish: list[Finish]


class Limits(BaseModel):
    """How much a request may ask for."""

    positions: int
    """Tokens in and out together."""
    slots: int
    """Slots of one prompt; 0 where the model cannot infill."""
    default_max_tokens: int


class ModelCard(ModelName):
    """Answer of GET /v1/model."""

    attention: Literal["prefix", "causal"]
    modes: list[str]
    """Modes that may be asked for."""
    tokens: int | None
    """Training tokens, those of the parent runs included."""
    flops: float | None
    """Training FLOPs, those of the parent runs included."""
    limits: Limits


class Health(BaseModel):
    """Answer of GET /healthz."""

    status: Literal["ok"] = "ok"


class Refusal(BaseModel):
    """Answer to a bad request, with an HTTP status of 4xx."""

    error: str
    """One line: what is wrong and what to change."""
