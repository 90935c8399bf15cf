"""Requests to the engine, and its reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ul2r.errors import RequestError
from ul2r.inference.plans import FinishReason, Plan
from ul2r.inference.sampling import SamplingSettings


class QueueFullError(RequestError):
    """Too many requests wait.

    Attributes:
        retry_after: Seconds after which a slot is expected to be free.
    """

    def __init__(self, num_waiting: int, retry_after: int) -> None:
        super().__init__(
            f"{num_waiting} requests are waiting, and no more may: try again in {retry_after} s"
        )
        self.retry_after = retry_after


class DeadlineError(RequestError):
    """A request's time was over before it began."""


class EngineStoppedError(RequestError):
    """The engine has failed or is shutting down."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of a sampled token, of the model's own distribution: without temperature, penalties or bias.

    Attributes:
        logprob: That of the token.
        top: The most likely tokens with theirs, in order.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outcome:
    """The end of an answer.

    Attributes:
        spans: Tokens of the text of each span; none of those that the answer did not come to.
        finish_reasons: Of each span.
        prompt_tokens: Tokens that were read at once.
        completion_tokens: Generated tokens, including sentinels and eos.
        cached: True if the prompt was found in the cache.
    """

    spans: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    prompt_tokens: int
    completion_tokens: int
    cached: bool


class Listener(Protocol):
    """Receives an answer, in the engine's thread: it returns at once and raises nothing."""

    def on_token(self, plan: Plan, span: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Receive a token of text, the last one of `plan.spans[span]`; return True to end the answer here."""

    def on_finish(self, outcome: Outcome) -> None:
        """Receive the end of the answer."""

    def on_error(self, error: Exception) -> None:
        """Receive the reason why there is no answer, or no more of it."""


@dataclass(eq=False)
class GenerationRequest:
    """A request in tokens; it is its own handle.

    Attributes:
        tokens: The prompt.
        plan: State of the answer.
        settings: How tokens are sampled.
        listener: Receives the answer.
        num_logprobs: Alternatives whose log probabilities are reported with each token; None reports none.
        deadline: Time of `time.monotonic` at which the answer ends as it is.
        is_cancelled: Set by `Engine.cancel`.
    """

    tokens: Sequence[int]
    plan: Plan
    settings: SamplingSettings
    listener: Listener
    num_logprobs: int | None = None
    deadline: float = math.inf
    is_cancelled: bool = field(default=False, init=False)


def make_outcome(request: GenerationRequest, *, cached: bool) -> Outcome:
    """Return the outcome of a request that has ended; spans that were cut off or never begun count as too long."""
    plan = request.plan
    cut_off: list[FinishReason] = ["length"] * (plan.num_spans - len(plan.finish_reasons))
    not_begun = [()] * (plan.num_spans - len(plan.spans))
    return Outcome(
        spans=(*(tuple(span) for span in plan.spans), *not_begun),
        finish_reasons=(*plan.finish_reasons, *cut_off),
        prompt_tokens=len(request.tokens),
        completion_tokens=plan.num_tokens,
        cached=cached,
    )


def compute_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Return the log probabilities of a sampled token; `logits` are float32 (V,)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(num_top)
    return TokenLogprobs(
        logprob=float(logprobs[token]),
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
