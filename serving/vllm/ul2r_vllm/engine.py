"""vLLM behind the interface of this project's engine, so that the same HTTP API serves both."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from ul2r.errors import RequestError
from ul2r.inference.engine import (
    DeadlineError,
    GenerationRequest,
    TokenLogprobs,
)
from ul2r.inference.engine.capacity import Capacity
from ul2r.inference.engine.counters import EngineStatistics
from ul2r.inference.engine.kv_cache import PromptCache
from ul2r.inference.engine.request import make_outcome
from ul2r_vllm.constraint import ARGUMENT
from ul2r_vllm.walk import AnswerWalk

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass
class _Live:
    """A request that vLLM has.

    Attributes:
        request: The request.
        walk: Place in its answer.
        started: Time at which vLLM got it.
        has_begun: True if its prompt has been read.
    """

    request: GenerationRequest
    walk: AnswerWalk
    started: float
    has_begun: bool = False


class VllmEngine:
    """Generates the answers to many requests at once; see `ul2r.inference.engine.Engine`, whose interface it has.

    Args:
        llm: vLLM's engine; nobody else may use it.
        vocabulary_size: Rows of the network's embedding.
        max_waiting: Requests that may wait beyond those that run at once; more are refused.

    Attributes:
        num_slots: Answers that can be in the making.
        max_length: Longest sequence.
        prompt_cache: Always empty: vLLM reads a prompt again that comes again.
        statistics: Counts since the start.
    """

    def __init__(self, llm: LLMEngine, vocabulary_size: int, max_waiting: int) -> None:
        self._llm = llm
        self._vocabulary_size = vocabulary_size
        self.num_slots: int = llm.vllm_config.scheduler_config.max_num_seqs
        self._capacity = Capacity(self.num_slots, max_waiting)
        self.max_length: int = llm.model_config.max_model_len
        self.prompt_cache = PromptCache(0)
        self.statistics = EngineStatistics()
        self._numbers = count()
        self._lock = threading.Lock()
        self._new: deque[GenerationRequest] = deque()
        self._live: dict[str, _Live] = {}

    @property
    def has_work(self) -> bool:
        """True if a step would do something."""
        return bool(self._new or self._live)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return min(self.num_slots, len(self._live))

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return max(0, len(self._live) - self.num_slots) + len(self._new)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests: all of them, or none; see `Engine.submit`.

        Raises:
            QueueFullError: If they are too many for now.
            RequestError: If a sampling setting is out of range, or they are more than ever have room.
        """
        self._capacity.check_size(len(requests))
        for request in requests:
            request.settings.check(self._vocabulary_size)
        with self._lock:
            # Copied, since the engine's thread changes it.
            known = [*self._new, *(live.request for live in list(self._live.values()))]
            num_known = sum(not request.is_cancelled for request in known)
            num_running = min(num_known, self.num_slots)
            self._capacity.check_room(
                len(requests), num_running, num_known - num_running, self.statistics
            )
            self._new.extend(requests)

    def cancel(self, request: GenerationRequest) -> None:
        """Free what a request has before the next step; its listener hears no more."""
        request.is_cancelled = True

    def step(self) -> None:
        """Drop what has ended, hand vLLM what is new, and let it do one step."""
        self._drop_ended()
        self._add_new()
        if not self._live:
            return
        for output in self._llm.step():
            # What vLLM sends of an answer after its end was under way before.
            if (live := self._live.get(output.request_id)) is not None:
                self._read_output(output, live)
        self.statistics.steps += 1

    def fail(self, error: RequestError) -> None:
        """End all requests with an error."""
        with self._lock:
            requests = [*self._new, *(live.request for live in self._live.values())]
            self._new.clear()
            self._live.clear()
        for request in requests:
            if not request.is_cancelled:
                request.listener.on_error(error)

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.engine_core.shutdown()

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for name, live in list(self._live.items()):
            request = live.request
            if request.is_cancelled:
                self.statistics.cancelled += 1
                self._remove(name)
            elif request.deadline <= now:
                self.statistics.expired += 1
                if live.has_begun:
                    self._finish(name, live)
                else:
                    self._remove(name)
                    request.listener.on_error(_make_deadline_error())

    def _add_new(self) -> None:
        now = time.monotonic()
        while self._new:
            request = self._new[0]
            if request.is_cancelled:
                self.statistics.cancelled += 1
            elif request.deadline <= now:
                self.statistics.expired += 1
                request.listener.on_error(_make_deadline_error())
            else:
                name = str(next(self._numbers))
                params = make_params(request, self.max_length)
                self._llm.add_request(name, {"prompt_token_ids": list(request.tokens)}, params)
                self._live[name] = _Live(request, AnswerWalk(request.plan), now)
                self.statistics.prompt_tokens += len(request.tokens)
            # It stays there until vLLM has it: if that fails, `fail` finds it.
            with self._lock:
                self._new.popleft()

    def _read_output(self, output: RequestOutput, live: _Live) -> None:
        live.has_begun = True
        completion = output.outputs[0]
        is_ended = output.finished
        for place, token in enumerate(completion.token_ids):
            sampled = live.walk.push(token)
            if sampled is None:
                continue
            self.statistics.generated_tokens += 1
            self.statistics.decoded_tokens += 1
            if sampled.is_text and not live.request.is_cancelled:
                logprobs = None
                if live.request.num_logprobs is not None:
                    logprobs = _convert_logprobs(
                        completion.logprobs[place], token, live.request.num_logprobs
                    )
                plan = live.request.plan
                if live.request.listener.on_token(plan, sampled.span, token, logprobs):
                    # A stop string, in the last span that there will be.
                    del plan.finish_reasons[sampled.span :]
                    plan.finish_reasons.append("stop")
                    is_ended = True
                    break
            if live.walk.is_done:
                is_ended = True
                break
        if is_ended:
            self._finish(output.request_id, live)

    def _finish(self, name: str, live: _Live) -> None:
        self._remove(name)
        self.statistics.record_answer(time.monotonic() - live.started)
        if not live.request.is_cancelled:
            live.request.listener.on_finish(make_outcome(live.request, cached=False))

    def _remove(self, name: str) -> None:
        self._llm.abort_request([name])
        with self._lock:
            del self._live[name]


def make_params(request: GenerationRequest, max_length: int) -> SamplingParams:
    """Return vLLM's parameters of a request: its settings, and the plan of its answer.

    Penalties apply after `logit_bias` in vLLM, and in this project's engine before it; a seed gives other samples.

    Args:
        request: The request, at its beginning.
        max_length: Longest sequence.
    """
    settings = request.settings
    description = request.plan.describe()
    num_spans = request.plan.num_spans
    # The tokens of all spans with their sentinels and what is typed already; the plan ends before.
    longest = len(request.plan.begin()) + num_spans * (description["max_tokens"] + 1)
    longest += len(description["forced"])
    # Only the last span has this closer: vLLM ends there without being told. A scored token does not end an answer.
    ends = description["stop"] if "stop" in description else description["closers"][-1:]
    if set(ends) & set(description["forced"]):
        ends = []
    return SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        logit_bias=dict(settings.logit_bias) or None,
        seed=settings.seed if settings.temperature > 0 else None,
        max_tokens=min(longest, max_length - len(request.tokens)),
        stop_token_ids=ends,
        ignore_eos=True,
        logprobs=request.num_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={ARGUMENT: description},
    )


def _convert_logprobs(found: dict[int, Logprob], token: int, num_top: int) -> TokenLogprobs:
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    return TokenLogprobs(
        logprob=found[token].logprob,
        top=tuple((other, logprob.logprob) for other, logprob in ranked[:num_top]),
    )


def _make_deadline_error() -> DeadlineError:
    return DeadlineError("the request's time was over before its answer began: try later")
