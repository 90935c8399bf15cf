"""The course of an answer after its prompt: which tokens are forced, which may be sampled, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
"""Why a generated text ended: the model ended it, or it reached its token limit."""


@dataclass(frozen=True)
class Step:
    """Consequence of a sampled token.

    Attributes:
        is_text: True if the token belongs to the text of the current span.
        feed: Tokens that the model reads next; empty at the end of the answer.
    """

    is_text: bool
    feed: tuple[int, ...]


class Plan(Protocol):
    """State of one answer.

    Attributes:
        spans: Tokens of the text of each span so far.
        num_spans: Number of spans that the answer has if nothing ends it before.
        finish_reasons: Of each span that has ended.
        num_tokens: Number of generated tokens so far, including sentinels and eos.
    """

    num_spans: int
    spans: list[list[int]]
    finish_reasons: list[FinishReason]
    num_tokens: int

    def begin(self) -> tuple[int, ...]:
        """Return the tokens that the model reads after its prompt, before the first one is sampled."""

    def forced_token(self) -> int | None:
        """Return the token of text that comes next whatever its probability, or None if it is sampled."""

    def given_tokens(self) -> tuple[int, ...]:
        """Return the tokens of text that the answer begins with and the request gives; to penalties they are prompt."""

    def also_allowed(self) -> tuple[int, ...]:
        """Return the tokens that may be sampled next besides text."""

    def accept(self, token: int) -> Step:
        """Continue with a sampled token."""

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values that `make_plan` makes a new plan of, at its beginning."""


class CompletionPlan:
    """Text up to a stop token or a limit; see `Plan`.

    Args:
        stop: Ids that end the text.
        max_tokens: Maximum number of tokens.
        min_tokens: The text does not end before.
        forced: Tokens that the text begins with, which are scored and do not count.
    """

    def __init__(
        self,
        stop: Sequence[int],
        max_tokens: int,
        min_tokens: int = 0,
        *,
        forced: Sequence[int] = (),
    ) -> None:
        self._stop = tuple(stop)
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._forced = tuple(forced)
        self.num_spans = 1
        self.spans: list[list[int]] = [[]]
        self.finish_reasons: list[FinishReason] = []
        self.num_tokens = 0

    def begin(self) -> tuple[int, ...]:
        """Return no token: the first one is sampled from the logits of the prompt."""
        return ()

    def forced_token(self) -> int | None:
        """Return the next token of those that are scored."""
        place = len(self.spans[0])
        return self._forced[place] if place < len(self._forced) else None

    def given_tokens(self) -> tuple[int, ...]:
        """Return the tokens that are scored."""
        return self._forced

    def also_allowed(self) -> tuple[int, ...]:
        """Return the stop tokens."""
        return self._stop if self.num_tokens >= self._min_tokens else ()

    def accept(self, token: int) -> Step:
        """Append a token, or end."""
        is_sampled = self.forced_token() is None
        self.num_tokens += is_sampled
        if is_sampled and token in self._stop:
            self.finish_reasons.append("stop")
            return Step(is_text=False, feed=())
        self.spans[0].append(token)
        # The last token is not read: its logits are not needed.
        if self.num_tokens >= self._max_tokens and self.forced_token() is None:
            self.finish_reasons.append("length")
            return Step(is_text=True, feed=())
        return Step(is_text=True, feed=(token,))

    def describe(self) -> dict[str, Any]:
        """See `Plan`."""
        return {
            "stop": list(self._stop),
            "max_tokens": self._max_tokens,
            "min_tokens": self._min_tokens,
            "forced": list(self._forced),
        }


class InfillPlan:
    """Spans in order, each opened by its sentinel; see `Plan` and `ul2r.inference.infilling.infill`.

    Args:
        openers: Sentinel of each slot.
        closers: Token that ends each span: the next sentinel, or eos.
        max_tokens: Maximum number of tokens of a span.
        typed: Tokens that the first span begins with, given by the request.
        min_tokens: A span does not end before.
        forced: Tokens behind those that the first span begins with; they are scored and do not count.
    """

    def __init__(
        self,
        openers: Sequence[int],
        closers: Sequence[int],
        max_tokens: int,
        typed: Sequence[int] = (),
        *,
        min_tokens: int = 0,
        forced: Sequence[int] = (),
    ) -> None:
        self._openers = tuple(openers)
        self._closers = tuple(closers)
        self._max_tokens = max_tokens
        self._typed = tuple(typed)
        self._min_tokens = min_tokens
        self._forced = tuple(forced)
        self.num_spans = len(self._openers)
        self.spans: list[list[int]] = [[]]
        self.finish_reasons: list[FinishReason] = []
        self.num_tokens = 1

    def begin(self) -> tuple[int, ...]:
        """Return the first sentinel and what is typed already behind it."""
        return (self._openers[0], *self._typed)

    def forced_token(self) -> int | None:
        """Return the next token of those that are scored."""
        place = len(self.spans[0])
        return self._forced[place] if place < len(self._forced) else None

    def given_tokens(self) -> tuple[int, ...]:
        """Return the tokens that are typed, and those that are scored."""
        return (*self._typed, *self._forced)

    def also_allowed(self) -> tuple[int, ...]:
        """Return the closer of the span, once there is text: an empty span never occurs in training."""
        span = self.spans[-1]
        has_text = bool(span) or (len(self.spans) == 1 and bool(self._typed))
        may_end = has_text and len(span) - self._num_forced() >= self._min_tokens
        return (self._closers[len(self.spans) - 1],) if may_end else ()

    def accept(self, token: int) -> Step:
        """Append a token to the span, or go on to the next one."""
        span = self.spans[-1]
        is_sampled = self.forced_token() is None
        if is_sampled and token == self._closers[len(self.spans) - 1]:
            return Step(is_text=False, feed=self._end_span("stop"))
        span.append(token)
        self.num_tokens += is_sampled
        if len(span) - self._num_forced() < self._max_tokens:
            return Step(is_text=True, feed=(token,))
        opener = self._end_span("length")
        # The last token is read too if another span continues from it.
        return Step(is_text=True, feed=(token, *opener) if opener else ())

    def _num_forced(self) -> int:
        """Return the number of forced tokens of the current span."""
        return len(self._forced) if len(self.spans) == 1 else 0

    def describe(self) -> dict[str, Any]:
        """See `Plan`."""
        return {
            "openers": list(self._openers),
            "closers": list(self._closers),
            "max_tokens": self._max_tokens,
            "typed": list(self._typed),
            "min_tokens": self._min_tokens,
            "forced": list(self._forced),
        }

    def _end_span(self, reason: FinishReason) -> tuple[int, ...]:
        """Return the next sentinel, or nothing after the last span."""
        self.finish_reasons.append(reason)
        if len(self.finish_reasons) < len(self._openers):
            self.spans.append([])
            self.num_tokens += 1
            return (self._openers[len(self.finish_reasons)],)
        # The closer of the last slot is generated too, unless the span reached its limit.
        self.num_tokens += reason == "stop"
        return ()


def make_plan(description: Mapping[str, Any]) -> Plan:
    """Return the plan that `Plan.describe` has described."""
    if "openers" in description:
        return InfillPlan(**description)
    return CompletionPlan(**description)
