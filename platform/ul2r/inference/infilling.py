"""Infilling: slots anywhere in a text are filled with the text on both sides as context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference.generation import (
    FinishReason,
    IncrementalDecoder,
    Sampler,
    resolve_max_tokens,
)
from ul2r.inference.language_model import LanguageModel


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
    vocabulary = model.require_denoising("infilling")
    # Parts are encoded one by one: no token may span a slot. Only the first one begins a document.
    encoded = [
        (model.encode_continuation if place else model.encode)(part)
        for place, part in enumerate(parts)
    ]
    # The only slot of a completion is at the end, so it needs no second sentinel.
    _check_parts(encoded, max(max_infill_slots(model), int(not any(encoded[-1:]))))

    num_slots = len(parts) - 1
    # The prompt ends in a sentinel, like every training input: that of the last slot, or one more after text.
    sentinels = vocabulary.sentinels[: num_slots + bool(encoded[-1])]
    prompt = [
        *model.encode_mode(mode, "infilling"),
        *_interleave(encoded, sentinels),
        *model.inputs_end,
    ]
    limit = resolve_max_tokens(
        model, len(prompt), max_tokens, num_spans=num_slots, extra_tokens_per_span=1
    )

    decoder = IncrementalDecoder(model, prompt, bidirectional=model.attention == "prefix")
    sampler = Sampler(model, temperature, seed)
    # A span ends where the next sentinel would begin, at the end of the text with eos.
    closers = (*sentinels, vocabulary.eos)[1 : num_slots + 1]
    # One decoder for all slots: each span has those before it as context, as in training.
    spans = [
        generate_span(decoder, sampler, opener, closer, limit)
        for opener, closer in zip(sentinels[:num_slots], closers, strict=True)
    ]

    fills = _decode_fills(model, encoded, [ids for ids, _ in spans])
    finish_reasons = tuple(finish_reason for _, finish_reason in spans)
    # The closer of the last slot is generated too, unless the span reached its limit.
    completion_tokens = sum(1 + len(ids) for ids, _ in spans) + (finish_reasons[-1] == "stop")
    return InfillResult(
        text="".join(text for pair in zip_longest(parts, fills, fillvalue="") for text in pair),
        fills=tuple(fills),
        finish_reasons=finish_reasons,
        prompt_tokens=len(prompt),
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


def max_infill_slots(model: LanguageModel) -> int:
    """Return the maximum number of slots in a text; 0 for a model that was not trained on denoisers.

    Each slot takes a sentinel, and one more closes the text.
    """
    if not model.metadata.denoising or model.vocabulary is None:
        return 0
    return len(model.vocabulary.sentinels) - 1


def _decode_fills(
    model: LanguageModel, parts: Sequence[list[int]], spans: Sequence[list[int]]
) -> list[str]:
    """Return the text of each span in the document that parts and spans make up."""
    fills: list[str] = []
    before = list(parts[0])
    for span, part in zip(spans, parts[1:], strict=True):
        fills.append(model.decode_continuation(before, span))
        before += [*span, *part]
    return fills


def _interleave(parts: Sequence[list[int]], sentinels: Sequence[int]) -> list[int]:
    """Return parts and sentinels alternately, starting with a part."""
    tokens: list[int] = []
    # One sentinel fewer than parts if the text ends in a slot, whose last part is then empty.
    for part, sentinel in zip_longest(parts, sentinels):
        tokens += part if sentinel is None else [*part, sentinel]
    return tokens


def _check_parts(parts: Sequence[list[int]], max_slots: int) -> None:
    """Refuse prompts that no training example looks like."""
    num_slots = len(parts) - 1
    if num_slots < 1:
        raise RequestError("the prompt has no slot: mark at least one place to fill")
    if num_slots > max_slots:
        raise RequestError(
            f"the prompt has {num_slots} slots, but the model has sentinels for {max_slots}: use fewer slots"
        )
    if not any(parts):
        raise RequestError("the prompt is empty: add text before or after a slot")
    # In span corruption two adjacent spans are a single one (arXiv 1910.10683, 3.1.4).
    for slot, between in enumerate(parts[1:-1], start=1):
        if not between:
            raise RequestError(
                f"slots {slot} and {slot + 1} are adjacent: put text between them, or merge them"
            )
