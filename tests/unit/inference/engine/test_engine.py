"""Every answer of the engine has the tokens that its request gets alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ul2r.data.tokenizer import build_vocabulary, train_tokenizer
from ul2r.errors import RequestError
from ul2r.inference import LanguageModel
from ul2r.inference.engine import (
    DeadlineError,
    Engine,
    GenerationRequest,
    Outcome,
    QueueFullError,
    TokenLogprobs,
    build_engine_parts,
)
from ul2r.inference.engine import engine as engine_module
from ul2r.inference.generation import IncrementalDecoder
from ul2r.inference.plans import Plan
from ul2r.inference.prompts import Prompt, prepare_completion, prepare_infilling
from ul2r.inference.sampling import SamplingSettings, TokenSampler
from ul2r.model.export_metadata import ExportMetadata
from ul2r.testing.families import MODELS, make_random_model
from ul2r.testing.models import TEXTS

TIE = 1e-4
"""Logits closer to each other than this may be ordered either way in float32."""
NUM_SLOTS = 3


def make_model(name: str, attention: str) -> LanguageModel:
    tokenizer = train_tokenizer(TEXTS, 300, 8)
    vocabulary = build_vocabulary(tokenizer)
    metadata = ExportMetadata(
        run=name,
        role="ul2r",
        attention="prefix" if attention == "prefix" else "causal",
        denoising=True,
        vocabulary=vocabulary,
    )
    network = make_random_model(name)
    network.set_attn_implementation("sdpa")
    return LanguageModel(network, tokenizer, metadata, frozenset({vocabulary.eos}))


@dataclass(frozen=True)
class Case:
    """A request with the answer that it gets alone."""

    prompt: Prompt
    settings: SamplingSettings
    spans: tuple[tuple[int, ...], ...]
    num_ties: int


def answer_alone(
    model: LanguageModel, prompt: Prompt, settings: SamplingSettings
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return the spans of an answer, and the steps of it where float32 could have chosen otherwise."""
    decoder = IncrementalDecoder(model, prompt.tokens, bidirectional=model.attention == "prefix")
    sampler = TokenSampler(model.is_text, settings, prompt.tokens)
    num_ties = 0

    def sample(allowed: Sequence[int]) -> int:
        nonlocal num_ties
        mask = model.is_text.clone()
        mask[list(allowed)] = True
        best = decoder.logits.masked_fill(~mask, -torch.inf).topk(2).values
        num_ties += bool(best[0] - best[1] < TIE)
        return sampler.sample(decoder.logits, allowed)

    spans = list[tuple[int, ...]]()
    if not prompt.openers:
        ids = list[int]()
        while len(ids) < prompt.max_tokens:
            token = sample(prompt.stop)
            if token in prompt.stop:
                break
            ids.append(token)
            decoder.feed(token)
        return (tuple(ids),), num_ties

    for opener, closer in zip(prompt.openers, prompt.closers, strict=True):
        decoder.feed(opener)
        ids = []
        while len(ids) < prompt.max_tokens:
            token = sample([closer] if ids else [])
            if token == closer:
                break
            ids.append(token)
            decoder.feed(token)
        spans.append(tuple(ids))
    return tuple(spans), num_ties


def list_cases(model: LanguageModel) -> list[Case]:
    prompts = [
        prepare_completion(model, "The sea was calm", max_tokens=9),
        prepare_completion(model, "def", max_tokens=14),
        prepare_completion(model, "a" * 30, mode="NLG", max_tokens=5),
        prepare_infilling(model, ["The ", " was calm, and ", " was he."], max_tokens=4),
        prepare_infilling(model, ["def area(", ")"], max_tokens=7, mode="NLG"),
        prepare_completion(model, "return width * height and so was he", max_tokens=1),
    ]
    varied = [
        SamplingSettings(),
        SamplingSettings(temperature=1.2, seed=3),
        SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, seed=4),
        SamplingSettings(presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.3),
        SamplingSettings(temperature=1.0, min_p=0.1, seed=5, logit_bias={70: 9.0}),
    ]
    pairs = [(prompt, SamplingSettings()) for prompt in prompts]
    pairs += [(prompts[number % len(prompts)], one) for number, one in enumerate(varied[1:])]
    return [
        Case(prompt, settings, *answer_alone(model, prompt, settings)) for prompt, settings in pairs
    ]


@dataclass
class Recorder:
    """Listener that keeps what it hears; see `Listener`."""

    tokens: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    outcome: Outcome | None = None
    error: Exception | None = None
    stops_after: int | None = None

    def on_token(self, plan: Plan, span: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        assert plan.spans[span][-1] == token
        self.tokens.append((span, token))
        self.logprobs.append(logprobs)
        return len(self.tokens) == self.stops_after

    def on_finish(self, outcome: Outcome) -> None:
        assert self.outcome is None
        self.outcome = outcome

    def on_error(self, error: Exception) -> None:
        self.error = error


def make_request(case: Case, recorder: Recorder, **settings: float) -> GenerationRequest:
    return GenerationRequest(
        case.prompt.tokens,
        case.prompt.make_plan(),
        case.settings,
        recorder,
        **settings,  # type: ignore[arg-type]  # of num_logprobs and deadline
    )


def make_engine(model: LanguageModel, *, max_waiting: int = 100, cache_bytes: int = 0) -> Engine:
    parts = build_engine_parts(
        model, num_slots=NUM_SLOTS, kv_bytes=None, prompt_cache_bytes=cache_bytes
    )
    return Engine(parts, max_waiting)


def run_until_idle(engine: Engine) -> None:
    for _ in range(1000):
        if not engine.has_work:
            return
        engine.step()
    pytest.fail("the engine does not come to an end")


@cache
def prepare(name: str, attention: str) -> tuple[list[Case], Engine]:
    """Return requests with their answers alone, and an engine on other weights of the same values."""
    # Two models: the engine takes over the network that it is given.
    return list_cases(make_model(name, attention)), make_engine(make_model(name, attention))


def check_schedule(
    name: str, attention: str, schedule: Sequence[tuple[int, int, int | None]]
) -> None:
    """Run requests that arrive after given steps, some of which are cancelled after so many tokens."""
    cases, engine = prepare(name, attention)
    recorders = [Recorder() for _ in schedule]
    requests = [
        make_request(cases[case % len(cases)], recorder)
        for (case, _, _), recorder in zip(schedule, recorders, strict=True)
    ]
    due = sorted(range(len(schedule)), key=lambda place: schedule[place][1])
    step = 0
    while due or engine.has_work:
        while due and schedule[due[0]][1] <= step:
            engine.submit([requests[due.pop(0)]])
        for (_, _, patience), recorder, request in zip(schedule, recorders, requests, strict=True):
            if patience is not None and len(recorder.tokens) >= patience:
                engine.cancel(request)
        engine.step()
        step += 1
        assert step < 1000

    num_ties = 0
    for (number, _, patience), recorder in zip(schedule, recorders, strict=True):
        case = cases[number % len(cases)]
        heard = [
            tuple(token for span, token in recorder.tokens if span == place)
            for place in range(len(case.spans))
        ]
        if recorder.outcome is not None:
            assert list(recorder.outcome.spans) == heard
        else:
            assert patience is not None, recorder.error
        is_equal = all(
            alone[: len(found)] == found if recorder.outcome is None else alone == found
            for alone, found in zip(case.spans, heard, strict=True)
        )
        if not is_equal:
            assert case.num_ties, f"{case.prompt}: {heard}, alone {case.spans}"
            num_ties += 1
    assert num_ties <= len(schedule) // 4, "more ties than float32 explains"
    assert engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize("attention", ["prefix", "causal"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_those_of_the_request_alone(name: str, attention: str) -> None:
    """All requests at once, on fewer slots, in every family; windows are shorter than the prompts."""
    rng = np.random.default_rng(0)
    schedule = [(case, int(rng.integers(12)), None) for case in rng.permutation(10)]
    check_schedule(name, attention, [*schedule, (2, 3, 2), (3, 5, 4)])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 30), st.one_of(st.none(), st.integers(0, 6))),
        min_size=1,
        max_size=12,
    )
)
def test_answers_do_not_depend_on_who_joins_and_leaves(
    schedule: list[tuple[int, int, int | None]],
) -> None:
    check_schedule("Llama 3.2", "prefix", schedule)


@pytest.mark.parametrize("name", ["Gemma 3", "GPT-2"])
def test_a_long_prompt_is_read_in_slices_while_others_go_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS_PER_STEP", 8)
    cases, engine = prepare(name, "prefix")
    short, long = Recorder(), Recorder()
    engine.submit([make_request(cases[1], short)])
    engine.step()
    engine.submit([make_request(cases[2], long)])

    heard = len(short.tokens)
    engine.step()
    engine.step()

    assert not long.tokens
    assert engine.num_running == 2
    assert len(short.tokens) == heard + 2
    run_until_idle(engine)
    assert long.outcome is not None
    assert long.outcome.spans == cases[2].spans
    check_schedule(name, "prefix", [(case, case, None) for case in range(10)])


def test_a_cancelled_prompt_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS_PER_STEP", 8)
    cases, engine = prepare("Gemma 3", "prefix")
    engine.submit([make_request(cases[1], Recorder())])
    engine.step()
    request = make_request(cases[2], Recorder())
    engine.submit([request])
    engine.step()
    num_tokens = engine.statistics.prompt_tokens

    engine.cancel(request)
    engine.step()

    assert engine.num_running == 1
    run_until_idle(engine)
    assert engine.statistics.prompt_tokens == num_tokens


def test_samples_of_a_prompt_read_it_once() -> None:
    cases, _ = prepare("Llama 2", "prefix")
    engine = make_engine(make_model("Llama 2", "prefix"))
    recorders = [Recorder() for _ in range(5)]
    case = cases[0]
    engine.submit([make_request(case, recorder) for recorder in recorders])
    run_until_idle(engine)

    assert engine.statistics.prompt_tokens == len(case.prompt.tokens)
    outcomes = [recorder.outcome for recorder in recorders if recorder.outcome is not None]
    assert [outcome.cached for outcome in outcomes] == [False, True, True, True, True]
    assert {outcome.spans for outcome in outcomes} == {case.spans}


def test_beyond_its_bound_the_queue_refuses_and_says_when_to_come_again() -> None:
    cases, _ = prepare("Llama 2", "prefix")
    engine = make_engine(make_model("Llama 2", "prefix"), max_waiting=2)
    recorders = [Recorder() for _ in range(NUM_SLOTS + 2)]
    engine.submit([make_request(cases[0], recorder) for recorder in recorders])

    with pytest.raises(QueueFullError, match="requests are waiting") as caught:
        engine.submit([make_request(cases[0], Recorder())])

    assert caught.value.retry_after >= 1
    # What never has room is refused for good: clients would try again after the other error.
    with pytest.raises(RequestError, match="asks for 6 answers") as refusal:
        engine.submit([make_request(cases[0], Recorder()) for _ in range(NUM_SLOTS + 3)])
    assert type(refusal.value) is RequestError
    run_until_idle(engine)
    assert all(recorder.outcome for recorder in recorders)
    assert engine.statistics.refused == 1


def test_at_its_deadline_an_answer_ends_and_a_waiting_request_is_refused() -> None:
    cases, engine = prepare("Llama 3.2", "prefix")
    live, late = Recorder(), Recorder()
    first = make_request(cases[1], live)
    engine.submit([first, make_request(cases[0], late, deadline=time.monotonic() - 1)])
    engine.step()
    assert isinstance(late.error, DeadlineError)

    engine.step()
    first.deadline = time.monotonic()
    engine.step()

    assert live.outcome is not None
    assert live.outcome.finish_reasons == ("length",)
    assert 0 < len(live.outcome.spans[0]) < 14
    assert not engine.has_work


def test_at_its_deadline_every_slot_has_a_reason() -> None:
    cases, engine = prepare("Llama 3.2", "prefix")
    recorder = Recorder()
    request = make_request(cases[3], recorder)
    engine.submit([request])
    while not recorder.tokens:
        engine.step()
    request.deadline = time.monotonic()
    engine.step()

    assert recorder.outcome is not None
    assert recorder.outcome.finish_reasons == ("length", "length")
    assert recorder.outcome.spans == (cases[3].spans[0][:1], ())


def test_a_listener_may_end_an_answer() -> None:
    cases, engine = prepare("Llama 3.2", "prefix")
    recorder = Recorder(stops_after=3)
    engine.submit([make_request(cases[1], recorder)])
    run_until_idle(engine)

    assert recorder.outcome is not None
    assert recorder.outcome.finish_reasons == ("stop",)
    assert recorder.outcome.spans == (cases[1].spans[0][:3],)


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    cases, engine = prepare("Llama 3.2", "prefix")
    recorder = Recorder()
    engine.submit([make_request(cases[0], recorder, num_logprobs=2)])
    run_until_idle(engine)

    model = make_model("Llama 3.2", "prefix")
    decoder = IncrementalDecoder(model, cases[0].prompt.tokens, bidirectional=True)
    for (_, token), found in zip(recorder.tokens, recorder.logprobs, strict=True):
        expected = decoder.logits.log_softmax(0)
        assert found is not None
        assert found.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(
            expected.topk(2).values.tolist(), abs=1e-4
        )
        decoder.feed(token)


def test_an_end_by_failure_reaches_every_listener() -> None:
    cases, _ = prepare("Llama 2", "prefix")
    engine = make_engine(make_model("Llama 2", "prefix"))
    recorders = [Recorder() for _ in range(NUM_SLOTS + 2)]
    engine.submit([make_request(cases[1], recorder) for recorder in recorders])
    engine.step()

    engine.fail(DeadlineError("over"))

    assert [str(recorder.error) for recorder in recorders] == ["over"] * len(recorders)
    assert not engine.has_work
