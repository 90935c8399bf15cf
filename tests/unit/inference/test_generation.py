"""Incremental decoding against full recomputation, sampling, and token limits."""

from __future__ import annotations

import math

import pytest
import torch

from ul2r.errors import RequestError
from ul2r.inference import LanguageModel, generate
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.prompts import DEFAULT_MAX_TOKENS, resolve_max_tokens
from ul2r.objective.vocabulary import Vocabulary


def recompute_logits(model: LanguageModel, tokens: list[int], prefix: int) -> torch.Tensor:
    """Return logits (V,) after the last token from one pass whose first `prefix` tokens see each other."""
    length = len(tokens)
    kv_end = torch.arange(1, length + 1, dtype=torch.int32).clamp(min=prefix)[None]
    return model.logits(torch.tensor([tokens]), torch.zeros_like(kv_end), kv_end)[0, -1]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("fixture", ["model", "windowed_model"])
def test_the_cache_gives_the_same_logits_as_full_recomputation(
    request: pytest.FixtureRequest, fixture: str, bidirectional: bool
) -> None:
    model: LanguageModel = request.getfixturevalue(fixture)
    prompt = model.encode("def area(width")
    assert len(prompt) > 4, "the prompt must be longer than the sliding window"
    prefix = len(prompt) if bidirectional else 1

    sequence = list(prompt)
    decoder = IncrementalDecoder(model, prompt, bidirectional=bidirectional)
    for _ in range(12):
        expected = recompute_logits(model, sequence, prefix)
        torch.testing.assert_close(decoder.logits, expected, atol=2e-5, rtol=1e-5)
        sequence.append(int(expected.masked_fill(~model.is_text, -math.inf).argmax()))
        decoder.feed(sequence[-1])

    generated = generate(model, prompt, max_tokens=12, stop=(), bidirectional=bidirectional)
    assert list(generated) == sequence[len(prompt) :]


def test_causal_greedy_tokens_equal_those_of_transformers_generate(
    causal_model: LanguageModel,
) -> None:
    prompt = causal_model.encode("The sea was")
    expected = causal_model.network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        suppress_tokens=(~causal_model.is_text).nonzero().flatten().tolist(),
    )

    generated = generate(causal_model, prompt, max_tokens=16, stop=(), bidirectional=False)

    assert list(generated) == expected[0, len(prompt) :].tolist()


def test_bidirectional_attention_over_the_prompt_changes_the_text(model: LanguageModel) -> None:
    prompt = model.encode("def area(width")

    bidirectional = list(generate(model, prompt, max_tokens=12, stop=(), bidirectional=True))
    causal = list(generate(model, prompt, max_tokens=12, stop=(), bidirectional=False))

    assert bidirectional != causal


def test_a_stop_token_is_the_last_one(model: LanguageModel) -> None:
    prompt = model.encode("he")
    unstopped = list(generate(model, prompt, max_tokens=10, stop=(), bidirectional=True))
    stop = unstopped[4]

    stopped = list(generate(model, prompt, max_tokens=10, stop={stop}, bidirectional=True))

    assert stopped == unstopped[: unstopped.index(stop) + 1]


def test_samples_depend_only_on_the_seed(model: LanguageModel) -> None:
    prompt = model.encode("he")

    def sample(seed: int) -> list[int]:
        return list(
            generate(
                model,
                prompt,
                max_tokens=10,
                stop=(),
                temperature=1.0,
                seed=seed,
                bidirectional=True,
            )
        )

    torch.manual_seed(1)
    first = sample(7)
    torch.manual_seed(2)
    assert sample(7) == first
    assert sample(8) != first


def test_samples_follow_the_softmax_at_the_temperature(model: LanguageModel) -> None:
    logits = torch.full((len(model.is_text),), -math.inf)
    text_ids = model.is_text.nonzero().flatten()[:3].tolist()
    logits[text_ids] = torch.tensor([0.0, 1.0, 2.0])

    sampler = Sampler(model, temperature=2.0, seed=0)
    samples = torch.tensor([sampler.sample(logits, ()) for _ in range(3000)])

    weights = [math.exp(value / 2) for value in (0, 1, 2)]
    for token, weight in zip(text_ids, weights, strict=True):
        share = float((samples == token).float().mean())
        assert share == pytest.approx(weight / sum(weights), abs=0.03)


def test_only_text_and_allowed_tokens_are_sampled(
    model: LanguageModel, vocabulary: Vocabulary
) -> None:
    text_id = model.encode("h")[0]
    logits = torch.zeros(len(model.is_text))
    logits[list(vocabulary.sentinels)] = 50.0
    logits[vocabulary.eos] = 40.0
    logits[text_id] = 30.0

    sampler = Sampler(model, 0.0, 0)

    assert sampler.sample(logits, ()) == text_id
    assert sampler.sample(logits, [vocabulary.eos]) == vocabulary.eos
    assert sampler.sample(logits, [vocabulary.sentinels[2]]) == vocabulary.sentinels[2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_the_smallest_temperatures_are_greedy(model: LanguageModel, temperature: float) -> None:
    logits = torch.linspace(-3, 3, len(model.is_text))
    greedy = Sampler(model, 0.0, 0).sample(logits, ())

    assert Sampler(model, temperature, 0).sample(logits, ()) == greedy


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_a_negative_or_non_finite_temperature_is_refused(
    model: LanguageModel, temperature: float
) -> None:
    with pytest.raises(RequestError, match=r"temperature=.* is out of range: choose 0 or more"):
        Sampler(model, temperature, 0)


@pytest.mark.parametrize(
    ("prompt_tokens", "num_spans", "extra", "largest"),
    [(100, 1, 0, 28), (127, 1, 0, 1), (100, 4, 1, 6), (101, 4, 1, 5), (120, 4, 1, 1)],
)
def test_spans_share_the_positions_that_the_prompt_leaves(
    model: LanguageModel, prompt_tokens: int, num_spans: int, extra: int, largest: int
) -> None:
    def resolve(max_tokens: int | None) -> int:
        return resolve_max_tokens(
            model, prompt_tokens, max_tokens, num_spans=num_spans, extra_tokens_per_span=extra
        )

    assert prompt_tokens + num_spans * (largest + extra) <= model.max_position_embeddings
    assert resolve(largest) == largest
    assert resolve(None) == largest
    with pytest.raises(RequestError, match=rf"max_tokens={largest + 1} .* choose 1 to {largest}$"):
        resolve(largest + 1)


def test_without_max_tokens_the_limit_is_the_default(model: LanguageModel) -> None:
    assert resolve_max_tokens(model, 10, None) == DEFAULT_MAX_TOKENS


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_max_tokens_below_one_is_refused(model: LanguageModel, max_tokens: int) -> None:
    with pytest.raises(RequestError, match=f"max_tokens={max_tokens} is out of range"):
        resolve_max_tokens(model, 10, max_tokens)


@pytest.mark.parametrize(
    ("prompt_tokens", "num_spans", "extra", "longest"),
    [(128, 1, 0, 127), (125, 2, 1, 124), (500, 1, 0, 127)],
)
def test_a_prompt_that_leaves_no_room_is_refused(
    model: LanguageModel, prompt_tokens: int, num_spans: int, extra: int, longest: int
) -> None:
    def resolve(prompt_tokens: int) -> int:
        return resolve_max_tokens(
            model, prompt_tokens, None, num_spans=num_spans, extra_tokens_per_span=extra
        )

    with pytest.raises(RequestError, match=rf"has {prompt_tokens} tokens, and at most {longest} "):
        resolve(prompt_tokens)
    assert resolve(longest) == 1
