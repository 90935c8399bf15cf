"""Requests at the same time: who waits, who is refused, and whose client has gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from serving.answers import Answer, Delta, Event, SpanText
from serving.api import create_api
from serving.service import LONG_TEXT, InferenceService, Job, load_examples
from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.inference import LanguageModel, complete
from ul2r.inference.engine import Engine, EngineStoppedError
from ul2r.inference.prompts import prepare_completion
from ul2r.inference.sampling import SamplingSettings
from ul2r.model.export_examples import Example, write_examples


@pytest.fixture
def small(folder: Path) -> Iterator[InferenceService]:
    """One slot, and room for one request that waits."""
    service = InferenceService(LanguageModel.load(folder), num_slots=1, max_waiting=1)
    yield service
    service.close()


def make_job(service: InferenceService, prompt: str = "The sea", max_tokens: int = 100) -> Job:
    return Job(
        prepare_completion(service.model, prompt, max_tokens=max_tokens),
        SamplingSettings(),
        min_tokens=max_tokens,
    )


def test_a_client_that_leaves_frees_its_slot_for_the_next(small: InferenceService) -> None:
    async def run() -> None:
        events = small.stream([make_job(small)])
        assert isinstance(await anext(events), Delta)
        waiting = asyncio.create_task(small.answer([make_job(small, "a", 3)]))

        await events.aclose()

        await waiting
        await events.aclose()

    asyncio.run(run())
    assert small.engine.engine.statistics.cancelled == 1
    assert small.engine.engine.statistics.generated_tokens < 100


def test_a_request_cancelled_while_it_waits_is_never_read(small: InferenceService) -> None:
    async def run() -> None:
        events = small.stream([make_job(small)])
        await anext(events)
        waiting = asyncio.create_task(small.answer([make_job(small, "never read", 3)]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await events.aclose()
        await small.answer([make_job(small, "a", 2)])

    asyncio.run(run())
    read = small.engine.engine.statistics.prompt_tokens
    prompts = [make_job(small, text, 2).prompt.tokens for text in ("The sea", "a")]
    assert read == sum(len(tokens) for tokens in prompts)


def test_beyond_the_bound_requests_get_429_at_once(
    small: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the engine does nothing, one has the slot and one waits: the third is refused, and the two are answered."""
    gate = threading.Event()
    real_step = small.engine.engine.step

    def step() -> None:
        assert gate.wait(30)
        real_step()

    monkeypatch.setattr(small.engine.engine, "step", step)
    body = {"prompt": "The sea", "max_tokens": 3}

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_api(small))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [
                asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)
            ]
            done, _ = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
            gate.set()
            assert [post.result().status_code for post in done] == [429]
            return await asyncio.gather(*posts)

    *answered, refused = sorted(asyncio.run(run()), key=lambda response: response.status_code)

    assert [response.status_code for response in answered] == [200, 200]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_a_request_that_is_over_in_time_ends_as_it_is(
    small: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the engine jumps when some tokens have come."""
    real_monotonic = time.monotonic
    job = Job(make_job(small).prompt, SamplingSettings(), min_tokens=100, timeout_s=1000)
    seconds = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return real_monotonic() + seconds

    monkeypatch.setattr("ul2r.inference.engine.engine.time", Clock)

    async def run() -> str:
        nonlocal seconds
        events = small.stream([job])
        assert isinstance(await anext(events), Delta)
        seconds = 2000.0
        finals = [event async for event in events if not isinstance(event, Delta)]
        (final,) = finals
        return final.outcome.finish_reasons[0]  # type: ignore[union-attr]  # not a `Failure`

    assert asyncio.run(run()) == "length"
    assert small.engine.engine.statistics.expired == 1


@pytest.mark.parametrize("place", ["step", "read_prompt", "write"])
def test_an_engine_that_has_failed_is_not_healthy(
    small: InferenceService, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Wherever a request is when the engine fails, it is answered."""

    def fail(*_: object) -> None:
        raise ValueError("broken")

    engine = small.engine.engine
    assert isinstance(engine, Engine)
    owner = {"step": engine, "read_prompt": engine._runner, "write": engine._slots}[place]
    monkeypatch.setattr(owner, place, fail)

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_api(small))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            healthy = await client.get("/health")
            async with asyncio.timeout(60):
                first = await client.post("/v1/completions", json={"prompt": "a"})
            return [healthy, first, await client.get("/health")]

    before, answer, after = asyncio.run(run())
    assert before.json() == {"status": "ok"}
    assert (answer.status_code, after.status_code) == (503, 503)
    assert {response.headers["retry-after"] for response in (answer, after)} == {"1"}
    assert isinstance(small.engine.error, ValueError)
    with pytest.raises(EngineStoppedError):
        small.engine.submit([])


def test_many_requests_at_once_get_the_answers_of_one_after_the_other(
    service: InferenceService, model: LanguageModel
) -> None:
    prompts = [f"def area{number}(" for number in range(9)]

    async def run() -> list[str]:
        jobs = [[make_job(service, prompt, 9)] for prompt in prompts]
        answers = await asyncio.gather(*(service.answer(job) for job in jobs))
        return [final.fills[0] for (final,) in answers]

    num_threads = threading.active_count()
    texts = asyncio.run(run())

    assert threading.active_count() <= num_threads
    assert texts == [complete(model, prompt, max_tokens=9).text for prompt in prompts]


@pytest.mark.parametrize("stop", [(), ("x",), ("ä\n",)])
def test_characters_of_several_tokens_are_released_whole(
    model: LanguageModel, stop: tuple[str, ...]
) -> None:
    """Bytes of a character are tokens of their own: no piece of text ends in the middle of it."""
    text = "aä🙂 b"
    span = SpanText(model, [], stop)
    pieces = []
    for token in model.encode(text):
        span.push(token)
        pieces.append(span.release(at_end=False))
    span.end()
    pieces.append(span.release(at_end=True))

    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 4


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    """Llama 2's decoder spells all bytes of a row anew, when one of them is wrong: what was released stays."""
    vocabulary = {"<0xC3>": 0, "<0xA4>": 1}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    span = SpanText(DocumentTokenizer(tokenizer), [], [])  # type: ignore[arg-type]  # it only decodes
    released = []
    for token in (0, 1, 0):
        span.push(token)
        released.append(span.release(at_end=False))
    span.end()

    assert released == ["", "ä", ""]
    assert span.release(at_end=True) == "\N{REPLACEMENT CHARACTER}"
    span.end()
    assert span.text == "ä\N{REPLACEMENT CHARACTER}"


def test_an_answer_for_a_loop_that_has_closed_ends_nothing(
    service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop may close between any two steps of the engine, which goes on for others."""
    loop = asyncio.new_event_loop()
    job = make_job(service)
    events: asyncio.Queue[Event] = asyncio.Queue()
    answer = Answer(0, service.model, job.prompt, (), events, loop, True, service.metrics)
    loop.close()
    # As it was when somebody asked.
    monkeypatch.setattr(loop, "is_closed", lambda: False)

    answer.on_error(ValueError("late"))
    monkeypatch.undo()

    assert events.empty()


def test_the_beginning_of_a_stop_string_is_held_back(model: LanguageModel) -> None:
    span = SpanText(model, [], ["def"])
    released = []
    for token in [model.encode(letter)[0] for letter in "adebdef"]:
        span.push(token)
        released.append(span.release(at_end=False))

    assert released == ["a", "", "", "deb", "", "", ""]
    assert span.is_stopped
    assert span.text == "adeb"


def test_long_texts_are_encoded_beside_the_event_loop(
    service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[tuple[int, int]]()
    encode = service.model.encode

    def note_thread(text: str) -> list[int]:
        threads.append((len(text), threading.get_ident()))
        return encode(text)

    monkeypatch.setattr(service.model, "encode", note_thread)
    texts = ["a", "a" * LONG_TEXT]

    async def run() -> int:
        transport = httpx.ASGITransport(create_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for text in texts:
                for path in ("/v1/completions", "/tokenize", "/v1/fim/completions"):
                    await client.post(path, json={"prompt": text})
        return threading.get_ident()

    loop = asyncio.run(run())
    assert len(threads) == 6
    assert all((thread == loop) == (size == 1) for size, thread in threads)


def test_examples_of_an_export_are_prompts_with_slots(tmp_path: Path) -> None:
    assert load_examples(tmp_path) == []
    examples = [
        Example("The sea", ", and so was he.", " was calm"),
        Example("Once", "", " upon"),
        Example("a <slot> in the text", " itself", ""),
    ]
    write_examples(tmp_path, examples)

    assert load_examples(tmp_path) == ["The sea<slot>, and so was he.", "Once"]
