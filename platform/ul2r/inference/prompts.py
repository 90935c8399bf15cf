"""Requests in text as prompts in tokens: modes, sentinels and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ul2r.config.denoisers import Mode
from ul2r.errors import RequestError
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.plans import CompletionPlan, InfillPlan, Plan

DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A request in tokens.

    Attributes:
        tokens: What the model reads at once.
        parts: Tokens of the document around the spans: of the text before the first span, between spans, and after the
            last one.
        max_tokens: Maximum number of tokens of each span.
        openers: Sentinel of each slot; none for text that simply continues.
        closers: Token that ends each span.
        stop: Ids that end a text without sentinels.
        typed: Tokens that the first span begins with.
        forced: Tokens that follow those, one by one, so that they are scored.
    """

    tokens: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    max_tokens: int
    openers: tuple[int, ...] = ()
    closers: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    typed: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()

    def make_plan(self, min_tokens: int = 0) -> Plan:
        """Return the state of a new answer."""
        if self.openers:
            return InfillPlan(
                self.openers,
                self.closers,
                self.max_tokens,
                self.typed,
                min_tokens=min_tokens,
                forced=self.forced,
            )
        return CompletionPlan(self.stop, self.max_tokens, min_tokens, forced=self.forced)

    def tokens_before(self, spans: Sequence[Sequence[int]]) -> list[int]:
        """Return the tokens of the document before the last of some spans."""
        before = [*self.parts[0], *self.typed]
        # Every span but the last has ended: the part behind it precedes the next one.
        for span, part in zip(spans[:-1], self.parts[1:], strict=False):
            before += [*span, *part]
        return before


def prepare_completion(
    model: LanguageModel,
    prompt: str | Sequence[int],
    *,
    mode: Mode | None = None,
    max_tokens: int | None = None,
    prefix_tokens: int | None = None,
) -> Prompt:
    """Return the prompt of a continuation; see `ul2r.inference.complete`.

    Args:
        model: The model.
        prompt: Text, or its tokens.
        mode: Mode of the denoiser.
        max_tokens: Maximum number of tokens; 0 only with `prefix_tokens`.
        prefix_tokens: Number of tokens of the prompt that are read as such. The others are scored: each is read after
            all before it, as the model reads its own answer. Default: all are read.

    Raises:
        RequestError: If the request does not fit the model.
    """
    # Without a token there is no logit to start from.
    if not prompt:
        raise RequestError("the prompt is empty: give some text to continue")

    # A causal model never read a mode in training, so the default gives it none.
    if mode is None and model.metadata.denoising:
        mode = "S2S"
    inputs = list[int]()
    if mode is not None:
        inputs += model.encode_mode(mode, f"mode {mode}")

    text = model.encode(prompt) if isinstance(prompt, str) else check_tokens(model, prompt)
    forced = list[int]()
    if prefix_tokens is not None:
        if not 1 <= prefix_tokens <= len(text):
            raise RequestError(
                f"prefix_tokens={prefix_tokens} is out of range: choose 1 to {len(text)}, the prompt's number of tokens"
            )
        text, forced = text[:prefix_tokens], text[prefix_tokens:]
    if mode in ("NLU", "NLG") or (mode == "S2S" and model.metadata.prefix_sentinel):
        # One slot at the end: the prompt closes with its sentinel.
        return _prepare_slots(model, [text, []], mode, max_tokens, forced=forced)
    if not text:
        raise RequestError("the prompt has no token: give some text to continue")
    inputs += text
    if mode is not None:
        inputs += model.inputs_end

    # The mode counts against the model's maximum length, so it is in front before the limit is computed.
    return Prompt(
        tokens=tuple(inputs),
        parts=(tuple(text), ()),
        max_tokens=resolve_max_tokens(
            model, len(inputs) + len(forced), max_tokens, min_tokens=int(not forced)
        ),
        stop=tuple(sorted(model.eos_token_ids)),
        forced=tuple(forced),
    )


def prepare_infilling(
    model: LanguageModel,
    parts: Sequence[str],
    *,
    mode: Mode = "NLU",
    max_tokens: int | None = None,
    typed: str = "",
) -> Prompt:
    """Return the prompt of a text with slots; see `ul2r.inference.infill`.

    Args:
        model: A model trained on denoisers.
        parts: n + 1 texts around n slots.
        mode: Mode of the denoiser.
        max_tokens: Maximum number of tokens per slot.
        typed: Text that the first slot begins with; the answer continues it.

    Raises:
        RequestError: If the model was trained causally, or the request does not fit the model.
    """
    model.require_denoising("infilling")
    # Parts are encoded one by one: no token may span a slot. Only the first one begins a document.
    encoded = [
        (model.encode_continuation if place else model.encode)(part)
        for place, part in enumerate(parts)
    ]
    return _prepare_slots(model, encoded, mode, max_tokens, typed=model.encode_continuation(typed))


def _prepare_slots(
    model: LanguageModel,
    parts: Sequence[list[int]],
    mode: Mode,
    max_tokens: int | None,
    *,
    typed: Sequence[int] = (),
    forced: Sequence[int] = (),
) -> Prompt:
    vocabulary = model.require_denoising("infilling")
    # The only slot of a completion is at the end, so it needs no second sentinel.
    _check_parts(parts, max(max_infill_slots(model), int(not any(parts[-1:]))))

    num_slots = len(parts) - 1
    # The prompt ends in a sentinel, like every training input: that of the last slot, or one more after text.
    sentinels = vocabulary.sentinels[: num_slots + bool(parts[-1])]
    tokens = (
        *model.encode_mode(mode, "infilling"),
        *_interleave(parts, sentinels),
        *model.inputs_end,
    )
    limit = resolve_max_tokens(
        model,
        len(tokens) + len(typed) + len(forced),
        max_tokens,
        num_spans=num_slots,
        extra_tokens_per_span=1,
        min_tokens=int(not forced),
    )
    return Prompt(
        tokens=tokens,
        parts=tuple(tuple(part) for part in parts),
        max_tokens=limit,
        openers=tuple(sentinels[:num_slots]),
        # A span ends where the next sentinel would begin, at the end of the text with eos.
        closers=(*sentinels, vocabulary.eos)[1 : num_slots + 1],
        typed=tuple(typed),
        forced=tuple(forced),
    )


def check_tokens(model: LanguageModel, tokens: Sequence[int]) -> list[int]:
    """Return tokens that a request gives as such.

    Raises:
        RequestError: If the model has no such token.
    """
    size = len(model.is_text)
    for token in tokens:
        if not 0 <= token < size:
            raise RequestError(f"the model has no token {token}: choose 0 to {size - 1}")
    return list(tokens)


def max_infill_slots(model: LanguageModel) -> int:
    """Return the maximum number of slots in a text; 0 for a model that was not trained on denoisers.

    Each slot takes a sentinel, and one more closes the text.
    """
    if not model.metadata.denoising or model.vocabulary is None:
        return 0
    return len(model.vocabulary.sentinels) - 1


def resolve_max_tokens(
    model: LanguageModel,
    prompt_tokens: int,
    max_tokens: int | None,
    *,
    num_spans: int = 1,
    extra_tokens_per_span: int = 0,
    min_tokens: int = 1,
) -> int:
    """Return the token limit of each generated text, after checking it against the model's maximum length.

    Args:
        model: Model whose maximum length prompt and completion share.
        prompt_tokens: Number of tokens of the prompt, including mode and sentinels.
        max_tokens: Limit in the request; None stands for `DEFAULT_MAX_TOKENS`, or fewer where fewer fit.
        num_spans: Number of texts to generate.
        extra_tokens_per_span: Tokens of each text beyond its limit, such as its sentinel.
        min_tokens: Lowest limit that there may be.

    Raises:
        RequestError: If the prompt leaves no room, or `max_tokens` is out of range.
    """
    max_length = model.max_position_embeddings
    # Every span may reach its limit, so they share the remaining positions equally.
    room = (max_length - prompt_tokens) // num_spans - extra_tokens_per_span
    if room < min_tokens:
        longest_prompt = max_length - num_spans * (min_tokens + extra_tokens_per_span)
        raise RequestError(
            f"the prompt is too long: it has {prompt_tokens} tokens, and at most {longest_prompt} leave room for a "
            f"completion within the model's maximum length of {max_length}: shorten it"
        )

    if max_tokens is None:
        return min(room, DEFAULT_MAX_TOKENS)
    if not min_tokens <= max_tokens <= room:
        raise RequestError(
            f"max_tokens={max_tokens} is out of range: with {prompt_tokens} prompt tokens and a maximum length of "
            f"{max_length}, choose {min_tokens} to {room}"
        )
    return max_tokens


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
