"""Infilling: slots anywhere in a text are filled with the text on both sides as context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ul2r.config.denoisers import Mode
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.plans import FinishReason
from ul2r.inference.prompts import Prompt, prepare_infilling


@dataclass(frozen=True)
class InfillResult:
    """Text with its slots filled.

    Attributes:
        text: The parts with the fills between them.
        fills: Text of each slot.
        finish_reasons: For each slot, whether the model ended it ("stop") or its token limit did ("length").
        prompt_tokens: Number of tokens read: mode, parts and sentinels.
        completion_tokens: Number of tokens of the targets, including sentinels and eos.
    """

    text: str
    fills: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    prompt_tokens: int
    completion_tokens: int


def infill(
    model: LanguageModel,
    parts: Sequence[str],
    *,
    mode: Mode = "NLU",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> InfillResult:
    """Fill the slots between the parts of a text.

        infill(model, ["The capital of", " is Paris, that of", " is Rome."])

    The prompt has the form of span corruption in training (arXiv 2205.05131, 3.1): the parts with a sentinel in place
    of each slot; the model then writes each sentinel followed by its span. A training input always ends in a sentinel,
    so one more sentinel closes the prompt if text follows the last slot. That sentinel's span stands for the text
    after the prompt, and generation stops where it would begin. An eos follows if the model was trained with one
    (`objective.eos_after_inputs`).

    Sentinels come in order whatever the model's preference: inside a span only text and the sentinel of the next slot
    are allowed (eos for a slot at the end of the text), the closing token only after at least one token of text, and a
    span that reaches its token limit is closed for the model. Hence every slot gets filled.

    Args:
        model: A model trained on denoisers.
        parts: n + 1 texts around n slots; the first and the last may be empty.
        mode: NLU was trained on short spans, NLG on long or many ones, S2S on continuations (some with a sentinel).
        max_tokens: Maximum number of tokens per slot; default 64, or fewer where fewer fit.
        temperature: 0 is greedy.
        seed: Seed of the sampling.

    Raises:
        RequestError: If the model was trained causally, or the request does not fit the model.
    """
    prompt = prepare_infilling(model, parts, mode=mode, max_tokens=max_tokens)
    return fill_slots(model, prompt, parts, temperature=temperature, seed=seed)


def fill_slots(
    model: LanguageModel,
    prompt: Prompt,
    parts: Sequence[str],
    *,
    temperature: float,
    seed: int,
) -> InfillResult:
    """Fill the slots of a prepared prompt, one token after the other; `parts` are the texts around them."""
    decoder = IncrementalDecoder(model, prompt.tokens, bidirectional=model.attention == "prefix")
    sampler = Sampler(model, temperature, seed)
    # One decoder for all slots: each span has those before it as context, as in training.
    spans = [
        generate_span(decoder, sampler, opener, closer, prompt.max_tokens)
        for opener, closer in zip(prompt.openers, prompt.closers, strict=True)
    ]

    fills = decode_fills(model, prompt, [ids for ids, _ in spans])
    finish_reasons = tuple(finish_reason for _, finish_reason in spans)
    # The closer of the last slot is generated too, unless the span reached its limit.
    completion_tokens = sum(1 + len(ids) for ids, _ in spans) + (finish_reasons[-1] == "stop")
    return InfillResult(
        text=join_fills(parts, fills),
        fills=tuple(fills),
        finish_reasons=finish_reasons,
        prompt_tokens=len(prompt.tokens),
        completion_tokens=completion_tokens,
    )


def generate_span(
    decoder: IncrementalDecoder, sampler: Sampler, opener: int, closer: int, limit: int
) -> tuple[list[int], FinishReason]:
    """Generate the text of one slot.

    Args:
        decoder: State after the prompt and earlier spans; it reads the opener and the span.
        sampler: Selects the tokens.
        opener: Sentinel of the slot.
        closer: Token that ends the span: the next sentinel, or eos.
        limit: Maximum number of tokens.

    Returns:
        1 to `limit` tokens of text without opener and closer, and why they ended.
    """
    decoder.feed(opener)
    ids: list[int] = []
    while len(ids) < limit:
        # The first token must be text: an empty span never occurs in training.
        token = sampler.sample(decoder.logits, [closer] if ids else [])
        if token == closer:
            return ids, "stop"
        ids.append(token)
        # The last token too: the next span continues from it.
        decoder.feed(token)
    return ids, "length"


def decode_fills(model: LanguageModel, prompt: Prompt, spans: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each span in the document that parts and spans make up."""
    return [
        model.decode_continuation(prompt.tokens_before(spans[: number + 1]), span)
        for number, span in enumerate(spans)
    ]


def join_fills(parts: Sequence[str], fills: Sequence[str]) -> str:
    """Return a text with its slots filled."""
    return "".join(text for pair in zip_longest(parts, fills, fillvalue="") for text in pair)
