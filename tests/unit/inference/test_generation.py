from __future__ import annotations

import math

import pytest
import torch

from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, generate
from ul2r.inference.generation import (
    DEFAULT_MAX_TOKENS,
    IncrementalDecoder,
    Sampler,
    resolve_max_tokens,
)
from ul2r.objective.vocabulary import Vocabulary


def recomputed(model: LanguageModel, tokens: list[int], prefix: int) -> torch.Tensor:
    """Logits (V,) after the last token: the whole sequence at once, its first `prefix` tokens open to each other."""
    length = len(tokens)
    kv_end = torch.arange(1, length + 1, dtype=torch.int32).clamp(min=prefix)[None]
    return model.logits(torch.tensor([tokens]), torch.zeros_like(kv_end), kv_end)[0, -1]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", ["model", "windowed_model"])
def test_the_cache_gives_what_recomputing_everything_gives(
    request: pytest.FixtureRequest, kind: str, bidirectional: bool
) -> None:
    model: LanguageModel = request.getfixturevalue(kind)
    inputs = model.encode("def area(width")
    assert len(inputs) > 4  # the window
    prefix = len(inputs) if bidirectional else 1
    sequence = list(inputs)
    decoder = IncrementalDecoder(model, inputs, bidirectional=bidirectional)
    for _ in range(12):
        expected = recomputed(model, sequence, prefix)
        torch.testing.assert_close(decoder.logits, expected, atol=2e-5, rtol=1e-5)
        sequence.append(int(expected.masked_fill(~model.is_text, -math.inf).argmax()))
        decoder.feed(sequence[-1])
    produced = generate(model, inputs, max_tokens=12, stop=(), bidirectional=bidirectional)
    assert list(produced) == sequence[len(inputs) :]


def test_causal_greedy_tokens_are_those_of_transformers_generate(
    causal_model: LanguageModel,
) -> None:
    inputs = causal_model.encode("The sea was")
    own = causal_model.network.generate(
        torch.tensor([inputs]),
        attention_mask=torch.ones(1, len(inputs), dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        suppress_tokens=(~causal_model.is_text).nonzero().flatten().tolist(),
    )
    produced = generate(causal_model, inputs, max_tokens=16, stop=(), bidirectional=False)
    assert list(produced) == own[0, len(inputs) :].tolist()


def test_seeing_the_inputs_in_both_directions_changes_the_answer(model: LanguageModel) -> None:
    inputs = model.encode("def area(width")
    one, other = (
        list(generate(model, inputs, max_tokens=12, stop=(), bidirectional=way))
        for way in (True, False)
    )
    assert one != other


def test_a_stop_token_is_the_last_one(model: LanguageModel) -> None:
    inputs = model.encode("he")
    free = list(generate(model, inputs, max_tokens=10, stop=(), bidirectional=True))
    stop = free[4]
    stopped = list(generate(model, inputs, max_tokens=10, stop={stop}, bidirectional=True))
    assert stopped == free[: free.index(stop) + 1]


def test_draws_depend_on_the_seed_alone(model: LanguageModel) -> None:
    inputs = model.encode("he")

    def drawn(seed: int) -> list[int]:
        return list(
            generate(
                model,
                inputs,
                max_tokens=10,
                stop=(),
                temperature=1.0,
                seed=seed,
                bidirectional=True,
            )
        )

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    assert drawn(7) == first
    assert drawn(8) != first


def test_draws_follow_the_softmax_at_the_temperature(model: LanguageModel) -> None:
    logits = torch.full((len(model.is_text),), -math.inf)
    text = model.is_text.nonzero().flatten()[:3].tolist()
    logits[text] = torch.tensor([0.0, 1.0, 2.0])
    sampler = Sampler(model, temperature=2.0, seed=0)
    drawn = torch.tensor([sampler.choose(logits, ()) for _ in range(3000)])
    weights = [math.exp(value / 2) for value in (0, 1, 2)]
    for token, weight in zip(text, weights, strict=True):
        share = float((drawn == token).float().mean())
        assert share == pytest.approx(weight / sum(weights), abs=0.03)


def test_only_text_and_what_is_allowed_is_chosen(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    logits = torch.zeros(len(model.is_text))
    logits[list(vocabulary.sentinels)] = 50.0
    logits[vocabulary.eos] = 40.0
    plain = model.encode("h")[0]
    logits[plain] = 30.0
    sampler = Sampler(model, 0.0, 0)
    assert sampler.choose(logits, ()) == plain
    assert sampler.choose(logits, [vocabulary.eos]) == vocabulary.eos
    assert sampler.choose(logits, [vocabulary.sentinels[2]]) == vocabulary.sentinels[2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_the_smallest_temperature_is_greedy(model: LanguageModel, temperature: float) -> None:
    logits = torch.linspace(-3, 3, len(model.is_text))
    greedy = Sampler(model, 0.0, 0).choose(logits, ())
    assert Sampler(model, temperature, 0).choose(logits, ()) == greedy


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_an_impossible_temperature_is_refused(model: LanguageModel, temperature: float) -> None:
    with pytest.raises(RequestError, match=r"temperature=.* must be a number of 0 or more"):
        Sampler(model, temperature, 0)


@pytest.mark.parametrize(
    ("inputs", "spans", "marks", "most"),
    [(100, 1, 0, 28), (127, 1, 0, 1), (100, 4, 1, 6), (101, 4, 1, 5), (120, 4, 1, 1)],
)
def test_spans_share_the_positions_that_the_inputs_leave(
    model: LanguageModel, inputs: int, spans: int, marks: int, most: int
) -> None:
    assert inputs + spans * (most + marks) <= model.max_position_embeddings
    assert resolve_max_tokens(model, inputs, most, spans=spans, marks=marks) == most
    assert resolve_max_tokens(model, inputs, None, spans=spans, marks=marks) == most
    with pytest.raises(RequestError, match=rf"max_tokens={most + 1} .* choose 1 to {most}$"):
        resolve_max_tokens(model, inputs, most + 1, spans=spans, marks=marks)


def test_without_max_tokens_an_answer_has_the_default(model: LanguageModel) -> None:
    assert resolve_max_tokens(model, 10, None) == DEFAULT_MAX_TOKENS


@pytest.mark.parametrize("asked", [0, -5])
def test_no_tokens_at_all_are_refused(model: LanguageModel, asked: int) -> None:
    with pytest.raises(RequestError, match=f"max_tokens={asked} is out of range"):
        resolve_max_tokens(model, 10, asked)


@pytest.mark.parametrize(
    ("inputs", "spans", "marks", "most"), [(128, 1, 0, 127), (125, 2, 1, 124), (500, 1, 0, 127)]
)
def test_inputs_that_leave_no_room_are_refused(
    model: LanguageModel, inputs: int, spans: int, marks: int, most: int
) -> None:
    with pytest.raises(RequestError, match=rf"it makes {inputs} tokens, {most} is the most"):
        resolve_max_tokens(model, inputs, None, spans=spans, marks=marks)
    assert resolve_max_tokens(model, most, None, spans=spans, marks=marks) == 1
