"""Answers as text while they are generated: decoding token by token, stop strings, log probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ul2r.inference.engine import Outcome, TokenLogprobs

if TYPE_CHECKING:
    from serving.metrics import Metrics
    from ul2r.inference import LanguageModel
    from ul2r.inference.plans import Plan
    from ul2r.inference.prompts import Prompt

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenText:
    """A generated token with its log probabilities.

    Attributes:
        text: Its text.
        offset: Place of the text in its span, in characters.
        logprobs: Its log probabilities.
        top_texts: Texts of the alternatives in `logprobs.top`.
    """

    text: str
    offset: int
    logprobs: TokenLogprobs
    top_texts: tuple[str, ...]


@dataclass
class Delta:
    """New text of an answer.

    Attributes:
        choice: Number of the answer.
        span: Number of its span.
        text: The text.
        tokens: The tokens of it, if log probabilities were asked for.
    """

    choice: int
    span: int
    text: str
    tokens: list[TokenText]


@dataclass(frozen=True)
class Final:
    """The end of an answer.

    Attributes:
        choice: Number of the answer.
        fills: Text of each span.
        tokens: Tokens of the first span, if log probabilities were asked for.
        outcome: What the engine reports.
    """

    choice: int
    fills: tuple[str, ...]
    tokens: tuple[TokenText, ...]
    outcome: Outcome


@dataclass(frozen=True)
class Failure:
    """The reason why an answer has no end."""

    error: Exception


Event = Delta | Final | Failure


class SpanText:
    """Text of a span, of which each character is released when no later token can change it.

    Args:
        model: Decodes the tokens.
        before: Tokens of the document before the span.
        stop: Texts that end the answer; they are no part of it.
    """

    def __init__(self, model: LanguageModel, before: list[int], stop: Sequence[str]) -> None:
        self._model = model
        self._before = before
        self._stop = stop
        self._ids: list[int] = []
        # Tokens whose text is in `text`.
        self._num_read = 0
        self.text = ""
        self._num_released = 0
        self.is_stopped = False

    def push(self, token: int) -> None:
        """Append a token."""
        self._ids.append(token)
        context = [*self._before[-64:], *self._ids[max(0, self._num_read - 64) : self._num_read]]
        new = self._model.decode_continuation(context, self._ids[self._num_read :])
        # A character may take several tokens.
        if new.endswith(REPLACEMENT):
            return
        self._num_read = len(self._ids)
        self._append(new)

    def end(self) -> None:
        """Take the text of the last tokens as it is."""
        if not self.is_stopped and self._num_read < len(self._ids):
            whole = self._model.decode_continuation(self._before, self._ids)
            if whole.startswith(self.text):
                self._append(whole[len(self.text) :])

    def release(self, *, at_end: bool) -> str:
        """Return text that was not returned before, except for what may be the beginning of a stop string."""
        end = len(self.text)
        if not (at_end or self.is_stopped):
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        new = self.text[self._num_released : end]
        self._num_released = max(end, self._num_released)
        return new

    def _append(self, new: str) -> None:
        longest = max((len(stop) for stop in self._stop), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += new
        places = [self.text.find(stop, start) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


@dataclass(eq=False)
class Answer:
    """Listener of one answer; called in the engine's thread, it posts events to the event loop.

    Attributes:
        choice: Number of the answer in its response.
        model: Decodes tokens.
        prompt: The request's prompt.
        stop: Stop strings.
        events: Receives `Delta` (if `streams`), then `Final` or `Failure`.
        loop: Loop of `events`.
        streams: True if new text is posted at once.
        metrics: Receives the times of tokens.
    """

    choice: int
    model: LanguageModel
    prompt: Prompt
    stop: Sequence[str]
    events: asyncio.Queue[Event]
    loop: asyncio.AbstractEventLoop
    streams: bool
    metrics: Metrics
    _spans: list[SpanText] = field(default_factory=list)
    _tokens: list[TokenText] = field(default_factory=list)
    _num_posted_tokens: int = 0
    _last_time: float = field(default_factory=time.monotonic)
    _has_begun: bool = False

    def on_token(self, plan: Plan, span: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """See `Listener`."""
        self._observe_time()
        self._begin_spans(plan, span)
        text = self._spans[span]
        if logprobs is not None:
            self._tokens.append(self._describe(plan, token, logprobs, len(text.text)))
        text.push(token)
        if self.streams:
            self._post_delta(span, at_end=False)
        return text.is_stopped

    def on_finish(self, outcome: Outcome) -> None:
        """See `Listener`."""
        for span, text in enumerate(self._spans):
            text.end()
            if self.streams:
                self._post_delta(span, at_end=True)
        fills = [text.text for text in self._spans]
        fills += [""] * (len(self.prompt.parts) - 1 - len(fills))
        self._post(Final(self.choice, tuple(fills), tuple(self._tokens), outcome))

    def on_error(self, error: Exception) -> None:
        """See `Listener`."""
        self._post(Failure(error))

    def _begin_spans(self, plan: Plan, span: int) -> None:
        while len(self._spans) <= span:
            if self.streams and self._spans:
                self._spans[-1].end()
                self._post_delta(len(self._spans) - 1, at_end=True)
            spans = plan.spans[: len(self._spans) + 1]
            before = self.prompt.tokens_before(spans)
            self._spans.append(SpanText(self.model, before, self.stop))

    def _describe(self, plan: Plan, token: int, logprobs: TokenLogprobs, offset: int) -> TokenText:
        before = [*self.prompt.tokens_before(plan.spans), *plan.spans[-1][:-1]]
        return TokenText(
            text=self.model.decode_continuation(before, [token]),
            offset=offset,
            logprobs=logprobs,
            top_texts=tuple(
                self.model.decode_continuation(before, [other]) for other, _ in logprobs.top
            ),
        )

    def _observe_time(self) -> None:
        now = time.monotonic()
        histogram = self.metrics.inter_token if self._has_begun else self.metrics.first_token
        histogram.observe(now - self._last_time)
        self._has_begun = True
        self._last_time = now

    def _post_delta(self, span: int, *, at_end: bool) -> None:
        text = self._spans[span].release(at_end=at_end)
        tokens = self._tokens[self._num_posted_tokens :]
        if text or tokens:
            self._num_posted_tokens = len(self._tokens)
            self._post(Delta(self.choice, span, text, tokens))

    def _post(self, event: Event) -> None:
        # A loop that is closed has nobody who waits.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
