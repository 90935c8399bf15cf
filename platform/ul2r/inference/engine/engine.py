"""Continuous batching: requests join and leave between the steps of one batch.

A step, in order:

    1. answers whose client has gone or whose time is over leave; their slots are free
    2. waiting requests whose prompt is in the cache take free slots; the first other one begins to be read
    3. the prompt that is being read goes on for some layers: a short one through all of them
    4. every live answer reads one token, in one call, and samples the next

A slot holds the longest sequence there can be, so an answer that has one always ends: nothing is ever evicted. Rows of
the batch are slots 0 to B - 1; when an answer leaves, the last one moves to its slot.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ul2r.errors import RequestError
from ul2r.inference.engine.capacity import Capacity
from ul2r.inference.engine.counters import EngineStatistics
from ul2r.inference.engine.kv_cache import PromptBlock, PromptCache, SlotCache
from ul2r.inference.engine.request import (
    DeadlineError,
    GenerationRequest,
    compute_logprobs,
    make_outcome,
)
from ul2r.inference.engine.sliced_call import SlicedCall
from ul2r.inference.sampling import TokenSampler

if TYPE_CHECKING:
    from ul2r.inference.engine.memory import EngineParts

PROMPT_TOKENS_PER_STEP = 256
"""Tokens that are read through the whole network between two decoding steps; a longer prompt stops between layers."""


@dataclass
class _Row:
    """A live answer.

    Attributes:
        request: The request.
        sampler: Its sampler.
        length: Tokens in its slot.
        pending: Tokens that it reads next.
        cached: True if its prompt was found in the cache.
    """

    request: GenerationRequest
    sampler: TokenSampler
    length: int
    pending: deque[int]
    cached: bool
    started: float


@dataclass
class _Prefill:
    request: GenerationRequest
    call: SlicedCall[PromptBlock]


class Engine:
    """Generates the answers to many requests at once.

    `submit` and `cancel` may be called from any thread; all else is done in `step`, by one thread
    (`ul2r.inference.engine.thread`).

    Args:
        parts: Network and memory, from `build_engine_parts`.
        max_waiting: Requests that may wait; more are refused.

    Attributes:
        num_slots: Answers that can be in the making.
        max_length: Positions of a slot.
        prompt_cache: Prompts that may come again.
        statistics: Counts since the start.
    """

    def __init__(self, parts: EngineParts, max_waiting: int) -> None:
        self._runner = parts.runner
        self._slots: SlotCache = parts.slots
        self.prompt_cache: PromptCache = parts.prompts
        self._decode = parts.decode
        self._is_text = parts.is_text
        self.num_slots = parts.slots.num_slots
        self._capacity = Capacity(self.num_slots, max_waiting)
        self.max_length = parts.slots.num_positions

        self._lock = threading.Lock()
        self._waiting: deque[GenerationRequest] = deque()
        self._rows: list[_Row] = []
        self._prefill: _Prefill | None = None
        self.statistics = EngineStatistics()

    @property
    def has_work(self) -> bool:
        """True if a step would do something."""
        return bool(self._waiting or self._rows or self._prefill)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._rows) + (self._prefill is not None)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests: all of them, or none.

        Raises:
            QueueFullError: If they are too many for now.
            RequestError: If a sampling setting is out of range, or they are more than ever have room.
        """
        self._capacity.check_size(len(requests))
        for request in requests:
            request.settings.check(len(self._is_text))
            assert len(request.tokens) <= self.max_length
        with self._lock:
            # A client that has gone makes room at once, not only with the next step.
            num_running = sum(not row.request.is_cancelled for row in self._rows)
            # Read once: the engine's thread may end it meanwhile.
            if (prefill := self._prefill) is not None:
                num_running += not prefill.request.is_cancelled
            num_waiting = sum(not request.is_cancelled for request in self._waiting)
            self._capacity.check_room(len(requests), num_running, num_waiting, self.statistics)
            self._waiting.extend(requests)

    def cancel(self, request: GenerationRequest) -> None:
        """Free what a request has before the next step; its listener hears no more."""
        request.is_cancelled = True

    def step(self) -> None:
        """Do one step; see the module."""
        self._drop_ended()
        self._admit()
        self._advance_prefill()
        if self._rows:
            self._decode_rows()

    def fail(self, error: RequestError) -> None:
        """End all requests with an error."""
        with self._lock:
            requests = [*self._waiting, *(row.request for row in self._rows)]
            self._waiting.clear()
        if self._prefill is not None:
            requests.append(self._prefill.request)
            self._abandon_prefill()
        self._rows.clear()
        for request in requests:
            if not request.is_cancelled:
                request.listener.on_error(error)

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._lock:
            ended = [r for r in self._waiting if r.is_cancelled or r.deadline <= now]
            for request in ended:
                self._waiting.remove(request)
        if self._prefill is not None:
            request = self._prefill.request
            if request.is_cancelled or request.deadline <= now:
                self._abandon_prefill()
                ended.append(request)
        for request in ended:
            if request.is_cancelled:
                self.statistics.cancelled += 1
            else:
                self.statistics.expired += 1
                request.listener.on_error(
                    DeadlineError("the request's time was over before its answer began: try later")
                )

        # From the end, since the last row takes the place of one that leaves.
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.request.is_cancelled:
                self.statistics.cancelled += 1
                self._remove(slot)
            elif row.request.deadline <= now:
                self.statistics.expired += 1
                self._finish(slot)

    def _admit(self) -> None:
        """Give free slots to waiting requests, in their order, up to the first whose prompt must be read."""
        while self._waiting and self._prefill is None and len(self._rows) < self.num_slots:
            # It stays there until it has a slot: if the network fails meanwhile, `fail` finds it.
            request = self._waiting[0]
            if (block := self.prompt_cache.get(request.tokens)) is not None:
                self._begin(request, block, cached=True)
            elif self._rows and len(request.tokens) > PROMPT_TOKENS_PER_STEP:
                call = SlicedCall(partial(self._runner.read_prompt, request.tokens))
                with self._lock:
                    self._waiting.popleft()
                    self._prefill = _Prefill(request, call)
            else:
                # Short, or with nobody to keep waiting: in one go.
                self._end_prefill(request, self._runner.read_prompt(request.tokens))
                return

    def _advance_prefill(self) -> None:
        """Read on in the current prompt, if there is one."""
        if self._prefill is None:
            return
        request = self._prefill.request
        num_layers = self._runner.num_layers
        # One step more than there are layers: the end of the last one is a stop, too.
        num_steps = num_layers + 1
        if self._rows:
            num_steps = max(1, PROMPT_TOKENS_PER_STEP * num_layers // len(request.tokens))
        if self._prefill.call.advance(num_steps):
            self._end_prefill(request, self._prefill.call.result)

    def _end_prefill(self, request: GenerationRequest, block: PromptBlock) -> None:
        self.statistics.prompt_tokens += block.length
        self.prompt_cache.put(request.tokens, block)
        self._begin(request, block, cached=False)

    def _abandon_prefill(self) -> None:
        assert self._prefill is not None
        self._prefill.call.abandon()
        self._prefill = None

    def _begin(self, request: GenerationRequest, block: PromptBlock, *, cached: bool) -> None:
        """Move a request whose prompt is read to the next slot; sample its first token, unless that is given."""
        self._slots.write(len(self._rows), block)
        given = (*request.tokens, *request.plan.given_tokens())
        sampler = TokenSampler(self._is_text, request.settings, given)
        pending = deque(request.plan.begin())
        row = _Row(request, sampler, block.length, pending, cached, started=time.monotonic())
        with self._lock:
            if self._prefill is None:
                self._waiting.popleft()
            self._prefill = None
            self._rows.append(row)
        if not pending:
            self._sample([len(self._rows) - 1], block.logits[None])

    def _decode_rows(self) -> None:
        tokens = [row.pending.popleft() for row in self._rows]
        logits = self._decode(tokens, [row.length for row in self._rows])
        self.statistics.steps += 1
        self.statistics.decoded_tokens += len(tokens)
        for row in self._rows:
            row.length += 1
        # Rows with given tokens left do not sample.
        slots = [slot for slot, row in enumerate(self._rows) if not row.pending]
        if slots:
            self._sample(slots, logits[slots] if len(slots) < len(tokens) else logits)

    def _sample(self, slots: Sequence[int], logits: Tensor) -> None:
        """Sample a token of some rows; `logits` are float32 (rows, V)."""
        rows = [self._rows[slot] for slot in slots]
        allowed = [row.request.plan.also_allowed() for row in rows]
        greedy = self._select_greedy(rows, allowed, logits)
        ended = list[int]()
        for place, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            token = row.request.plan.forced_token()
            if token is None:
                token = greedy.get(place)
            if token is None:
                token = row.sampler.sample(logits[place], allowed[place])
            if self._accept(row, token, logits[place]):
                ended.append(slot)
        for slot in reversed(ended):
            self._finish(slot)

    def _select_greedy(
        self, rows: Sequence[_Row], allowed: Sequence[Sequence[int]], logits: Tensor
    ) -> dict[int, int]:
        """Return the tokens of the rows that take the most likely one, by their places: all in a few operations."""
        places = [i for i, row in enumerate(rows) if row.request.settings.is_plain_greedy]
        if not places:
            return {}
        chosen = logits if len(places) == len(rows) else logits[places]
        masked = chosen.masked_fill(~self._is_text, -torch.inf)
        for number, place in enumerate(places):
            ids = list(allowed[place])
            masked[number, ids] = chosen[number, ids]
        return dict(zip(places, masked.argmax(dim=-1).tolist(), strict=True))

    def _accept(self, row: _Row, token: int, logits: Tensor) -> bool:
        """Continue an answer with a token; return True if it has ended."""
        request = row.request
        span_before = len(request.plan.spans) - 1
        step = request.plan.accept(token)
        row.pending.extend(step.feed)
        self.statistics.generated_tokens += 1
        if not step.is_text or request.is_cancelled:
            return not step.feed
        logprobs = None
        if request.num_logprobs is not None:
            logprobs = compute_logprobs(logits, token, request.num_logprobs)
        if request.listener.on_token(request.plan, span_before, token, logprobs):
            # A stop string, in the last span that there will be.
            del request.plan.finish_reasons[span_before:]
            request.plan.finish_reasons.append("stop")
            return True
        return not step.feed

    def _finish(self, slot: int) -> None:
        row = self._rows[slot]
        self._remove(slot)
        self.statistics.record_answer(time.monotonic() - row.started)
        if not row.request.is_cancelled:
            row.request.listener.on_finish(make_outcome(row.request, cached=row.cached))

    def _remove(self, slot: int) -> None:
        """Free a slot; the last row moves there, so that rows stay next to each other."""
        last = self._rows.pop()
        if slot < len(self._rows):
            self._slots.move(len(self._rows), slot, last.length)
            self._rows[slot] = last
