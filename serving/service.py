"""Generation for HTTP requests: one model, one engine, events in the event loop."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from serving.answers import Answer, Event, Failure, Final
from serving.gate import record_answer, record_prompts
from serving.metrics import Metrics
from serving.schema import DEFAULT_SLOT
from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, max_infill_slots
from ul2r.inference.engine import (
    Engine,
    EngineThread,
    GenerationRequest,
    SteppedEngine,
    build_engine_parts,
)
from ul2r.inference.sampling import SamplingSettings
from ul2r.model.export_examples import read_examples

if TYPE_CHECKING:
    from pathlib import Path

    from serving.chat import ChatEncoder
    from ul2r.inference.prompts import Prompt

T = TypeVar("T")

LONG_TEXT = 20_000
"""Characters or tokens of a text that is encoded in a thread: shorter ones take less time than a step of the engine."""
DEFAULT_SLOTS = 16
DEFAULT_MAX_WAITING = 64
DEFAULT_PROMPT_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Job:
    """A prompt and how it is answered.

    Attributes:
        prompt: The prompt.
        settings: How tokens are sampled; choice i of n has this seed plus i.
        num_choices: Number of answers.
        stop: Texts that end an answer.
        num_logprobs: Alternatives reported for each token; None reports none.
        min_tokens: Answers do not end before.
        timeout_s: Seconds after which an answer ends as it is.
    """

    prompt: Prompt
    settings: SamplingSettings
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    min_tokens: int = 0
    timeout_s: float | None = None


class InferenceService:
    """Answers requests with one model.

    Args:
        model: The model; the engine takes over its network.
        chat_template: That of the export, if it has one.
        num_slots: Answers that are generated at once.
        max_waiting: Requests that may wait for a slot.
        kv_bytes: Memory for keys and values, see `build_engine_parts`.
        prompt_cache_bytes: Memory for prompts that may come again.
        engine: What generates, in place of an engine with these settings.
        examples: Prompts for people to begin with, see `load_examples`.

    Attributes:
        model: The model, for its text.
        model_id: Its name in requests and responses: that of its run.
        engine: The thread that generates.
        metrics: Times and counts.
        examples: As given.
    """

    def __init__(
        self,
        model: LanguageModel,
        chat_template: ChatEncoder | None = None,
        *,
        num_slots: int = DEFAULT_SLOTS,
        max_waiting: int = DEFAULT_MAX_WAITING,
        kv_bytes: int | None = None,
        prompt_cache_bytes: int = DEFAULT_PROMPT_CACHE_BYTES,
        engine: SteppedEngine | None = None,
        examples: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.model_id = model.metadata.run
        self.chat_template = chat_template
        self.examples = examples
        self.created = int(time.time())
        if engine is None:
            parts = build_engine_parts(
                model,
                num_slots=num_slots,
                kv_bytes=kv_bytes,
                prompt_cache_bytes=prompt_cache_bytes,
            )
            engine = Engine(parts, max_waiting)
        self.metrics = Metrics(engine)
        self.engine = EngineThread(engine)

    @property
    def max_slots(self) -> int:
        """Most slots of an infilling; 0 if the model cannot infill."""
        return max_infill_slots(self.model)

    def close(self) -> None:
        """End the engine's thread."""
        self.engine.close()

    async def answer(self, jobs: Sequence[Job]) -> list[Final]:
        """Return the answers of some prompts: all choices of the first, then those of the next.

        Raises:
            RequestError: If the model cannot do what the request asks for, or too many requests wait.
        """
        finals = dict[int, Final]()
        async with aclosing(self.stream(jobs, streams=False)) as events:
            async for event in events:
                if isinstance(event, Final):
                    finals[event.choice] = event
        return [finals[choice] for choice in sorted(finals)]

    async def stream(self, jobs: Sequence[Job], *, streams: bool = True) -> AsyncGenerator[Event]:
        """Yield new text as it comes, and the end of each answer.

        Whoever stops listening, as a server does when its client has gone, frees the answers' slots before the
        engine's next step.

        Raises:
            RequestError: See `answer`; before the first event if the request is refused.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        requests = self._make_requests(jobs, events, streams=streams)
        num_tokens = sum(len(job.prompt.tokens) + len(job.prompt.forced) for job in jobs)
        record_prompts(self.model_id, num_tokens, (self._write_out(job) for job in jobs))
        self.engine.submit(requests)
        num_open = len(requests)
        try:
            while num_open:
                event = await events.get()
                if isinstance(event, Failure):
                    raise event.error
                if isinstance(event, Final):
                    num_open -= 1
                    outcome = event.outcome
                    record_answer(outcome.completion_tokens, outcome.finish_reasons)
                yield event
        finally:
            if num_open:
                for request in requests:
                    self.engine.cancel(request)

    def _write_out(self, job: Job) -> str:
        prompt = job.prompt
        return self.model.decode([*prompt.tokens, *prompt.typed, *prompt.forced])

    def _make_requests(
        self, jobs: Sequence[Job], events: asyncio.Queue[Event], *, streams: bool
    ) -> list[GenerationRequest]:
        loop = asyncio.get_running_loop()
        requests = list[GenerationRequest]()
        for job in jobs:
            for number in range(job.num_choices):
                settings = replace(job.settings, seed=(job.settings.seed + number) % 2**63)
                answer = Answer(
                    choice=len(requests),
                    model=self.model,
                    prompt=job.prompt,
                    stop=job.stop,
                    events=events,
                    loop=loop,
                    streams=streams,
                    metrics=self.metrics,
                )
                deadline = math.inf if job.timeout_s is None else time.monotonic() + job.timeout_s
                requests.append(
                    GenerationRequest(
                        tokens=job.prompt.tokens,
                        plan=job.prompt.make_plan(job.min_tokens),
                        settings=settings,
                        listener=answer,
                        num_logprobs=job.num_logprobs,
                        deadline=deadline,
                    )
                )
        return requests


def load_examples(folder: Path) -> list[str]:
    """Return an export's examples as prompts, with the marker of a slot where the model fills.

    Raises:
        CheckpointError: If their file is damaged.
    """
    return [
        example.left + (f"{DEFAULT_SLOT}{example.right}" if example.right else "")
        for example in read_examples(folder)
        # It would be taken for a slot.
        if DEFAULT_SLOT not in example.left + example.right
    ]


async def run_beside_streams(num_characters: int, function: Callable[[], T]) -> T:
    """Call a function that encodes a text: in a thread if the text is long, so that streams do not wait for it.

    Tokenizers work without the interpreter's lock. A million characters take them a second.
    """
    if num_characters < LONG_TEXT:
        return function()
    return await asyncio.to_thread(function)


def draw_seed() -> int:
    """Return the seed of a request that gives none."""
    return secrets.randbits(62)


def check_model(service: InferenceService, name: str | None) -> None:
    """Refuse a request for another model.

    Raises:
        UnknownModelError: If the request names one that is not served here.
    """
    if name is not None and name != service.model_id:
        raise UnknownModelError(
            f"the model {name!r} is not served here: name {service.model_id!r}, or none"
        )


class UnknownModelError(RequestError):
    """A request names a model that is not served here."""
