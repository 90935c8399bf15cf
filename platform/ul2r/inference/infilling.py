"""Slots anywhere in a text, filled with what stands on both sides in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from ul2r.errors import RequestError
from ul2r.inference.generation import FinishReason, IncrementalDecoder, Sampler, resolve_max_tokens
from ul2r.inference.language_model import LanguageModel


@dataclass(frozen=True)
class InfillResult:
    """What filled the slots.

    Attributes:
        text: The parts with the fills between them.
        fills: One text for each slot.
        finish_reasons: For each slot, whether the model closed it or its token limit did.
        prompt_tokens: Tokens read: mode, parts and sentinels.
        completion_tokens: Tokens of the targets, sentinels and eos included.
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
    mode: Literal["NLU", "NLG"] = "NLU",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> InfillResult:
    """Fill the slots between the parts of a text.

        infill(model, ["The capital of", " is Paris, that of", " is Rome."])

    The model is shown what span corruption showed it in training (arXiv 2205.05131, 3.1): the parts, each slot as
    its sentinel, and it writes each sentinel followed by its span. An input of training always ends in a sentinel;
    so where text follows the last slot one more sentinel closes the input. Its span stands for what comes after the
    text, and generation stops where it would begin.

    Sentinels come in order whatever the model prefers: inside a span only text and the sentinel of the next slot can
    be chosen (eos in a slot that ends the text), that closing token only after one token of text, and at its token
    limit a span is closed for the model. Hence each slot gets an answer.

    Args:
        model: A model trained on denoisers.
        parts: n + 1 texts around n slots; the first and the last may be empty.
        mode: NLU was trained on short spans, NLG on long or many ones.
        max_tokens: Most tokens in each slot; without it 64, or what there is room for.
        temperature: 0 is greedy.
        seed: Seed of the draws.

    Raises:
        RequestError: If the model was trained causally, or the request cannot be answered as asked.
    """
    vocabulary = model.trained_modes("infilling")
    encoded = [model.encode(part) for part in parts]
    _check(encoded, max_infill_slots(model))
    slots = len(parts) - 1
    marks = vocabulary.sentinels[: slots + bool(encoded[-1])]
    inputs = [*vocabulary.modes[mode], *_joined(encoded, marks)]
    limit = resolve_max_tokens(model, len(inputs), max_tokens, spans=slots, marks=1)

    decoder = IncrementalDecoder(model, inputs, bidirectional=model.attention == "prefix")
    sampler = Sampler(model, temperature, seed)
    closers = (*marks, vocabulary.eos)[1 : slots + 1]
    spans = [
        _span(decoder, sampler, opener, closer, limit)
        for opener, closer in zip(marks[:slots], closers, strict=True)
    ]
    fills = [model.decode(ids) for ids, _ in spans]
    finish = tuple(finish for _, finish in spans)
    return InfillResult(
        text="".join(text for pair in zip_longest(parts, fills, fillvalue="") for text in pair),
        fills=tuple(fills),
        finish_reasons=finish,
        prompt_tokens=len(inputs),
        completion_tokens=sum(1 + len(ids) for ids, _ in spans) + (finish[-1] == "stop"),
    )


def _span(
    decoder: IncrementalDecoder, sampler: Sampler, opener: int, closer: int, limit: int
) -> tuple[list[int], FinishReason]:
    """The tokens of one slot, 1 to `limit` of them, and why they ended."""
    decoder.feed(opener)
    ids: list[int] = []
    while len(ids) < limit:
        token = sampler.choose(decoder.logits, [closer] if ids else [])
        if token == closer:
            return ids, "stop"
        ids.append(token)
        decoder.feed(token)
    return ids, "length"


def _joined(parts: Sequence[list[int]], marks: Sequence[int]) -> list[int]:
    """Parts and marks in turn, starting with a part."""
    joined: list[int] = []
    for part, mark in zip_longest(parts, marks):
        joined += part if mark is None else [*part, mark]
    return joined


def max_infill_slots(model: LanguageModel) -> int:
    """Slots that one text may have: a sentinel for each and one to close the text; 0 for a model without denoisers."""
    if not model.metadata.denoising or model.vocabulary is None:
        return 0
    return len(model.vocabulary.sentinels) - 1


def _check(parts: Sequence[list[int]], most: int) -> None:
    """Refuse what no training example looks like."""
    slots = len(parts) - 1
    if slots < 1:
        raise RequestError("the prompt has no slot: mark one place or more to fill")
    if slots > most:
        raise RequestError(
            f"the prompt has {slots} slots, the model can tell {most} apart: use fewer"
        )
    if not any(parts):
        raise RequestError("the prompt is empty: there must be text before or after a slot")
    for slot, between in enumerate(parts[1:-1], start=1):
        if not between:
            raise RequestError(
                f"slots {slot} and {slot + 1} are adjacent: put text between them, or merge them"
            )
