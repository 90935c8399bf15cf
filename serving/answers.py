"""Answers as text while they are generated: decoding token by token, stop strings, log probabilities."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ul2r.data.document_tokenizer import DECODING_CONTEXT
from ul2r.inference.engine import DeadlineError, Outcome, TokenLogprobs

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
        stop_text: The stop string that ended the answer, if one did.
    """

    choice: int
    fills: tuple[str, ...]
    tokens: tuple[TokenText, ...]
    outcome: Outcome
    stop_text: str | None


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

    Attributes:
        text: The text so far.
        stop_text: The stop string that ended it, if one did.
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
        self.stop_text: str | None = None

    @property
    def is_stopped(self) -> bool:
        """True if a stop string has ended the text."""
        return self.stop_text is not None

    def push(self, token: int) -> None:
        """Append a token."""
        self._ids.append(token)
        new = self._decode_unread()
        # A character may take several tokens.
        if not new.endswith(REPLACEMENT):
            self._append(new)

    def end(self) -> None:
        """Take the text of the last tokens as it is."""
        if not self.is_stopped and self._num_read < len(self._ids):
            self._append(self._decode_unread())

    def release(self, *, at_end: bool) -> str:
        """Return text that was not returned before, except for what may be the beginning of a stop string."""
        end = len(self.text)
        if not (at_end or self.is_stopped):
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        new = self.text[self._num_released : end]
        self._num_released = max(end, self._num_released)
        return new

    def _decode_unread(self) -> str:
        read = self._ids[max(0, self._num_read - DECODING_CONTEXT) : self._num_read]
        context = [*self._before[-DECODING_CONTEXT:], *read]
        return self._model.decode_continuation(context, self._ids[self._num_read :])

    def _append(self, new: str) -> None:
        self._num_read = len(self._ids)
        longest = max((len(stop) for stop in self._stop), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += new
        places = [(self.text.find(stop, start), stop) for stop in self._stop]
        found = [(place, stop) for place, stop in places if place >= 0]
        if found:
            place, self.stop_text = min(found)
            self.text = self.text[:place]


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
            self._tokens.append(self._describe(plan, span, logprobs, len(text.text)))
        # Tokens of the prompt that are only scored are no text of the answer.
        if span == 0 and len(plan.spans[0]) <= len(self.prompt.forced):
            return False
        text.push(token)
        if self.streams:
            self._post_delta(span, at_end=False)
        return text.is_stopped

    def on_finish(self, outcome: Outcome) -> None:
        """See `Listener`."""
        if len(outcome.spans[0]) < len(self.prompt.forced):
            # A sum of some scores would pass for that of all.
            late = "the request's time was over before its prompt was scored: raise timeout_s"
            self._post(Failure(DeadlineError(late)))
            return
        for span, text in enumerate(self._spans):
            text.end()
            if self.streams:
                self._post_delta(span, at_end=True)
        fills = [text.text for text in self._spans]
        fills += [""] * (len(self.prompt.parts) - 1 - len(fills))
        stop_text = self._spans[-1].stop_text if self._spans else None
        self._post(Final(self.choice, tuple(fills), tuple(self._tokens), outcome, stop_text))

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
            if not self._spans:
                before += self.prompt.forced
            self._spans.append(SpanText(self.model, before, self.stop))

    def _describe(self, plan: Plan, span: int, logprobs: TokenLogprobs, offset: int) -> TokenText:
        # The plan may have begun the next span already.
        *read, token = plan.spans[span]
        before = [*self.prompt.tokens_before(plan.spans[: span + 1]), *read]
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
        # A loop that is closed has nobody who waits; it may close at any time, so asking first would not do.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
