"""Texts that a model writes after a context, until one of several stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ul2r.errors import RequestError
from ul2r.evaluation.few_shot.prompting import PromptForm
from ul2r.inference import LanguageModel
from ul2r.inference.batch_generation import BatchRequest, generate_batch
from ul2r.inference.plans import CompletionPlan
from ul2r.inference.sampling import SamplingSettings

DEFAULT_MAX_TOKENS = 256
"""Tokens of an answer where a task names no limit, as in lm-eval's `hf`."""
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
UNSUPPORTED_KEYS = ("num_beams", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class WritingLimits:
    """End and manner of an answer.

    Attributes:
        stop: Strings that end it; they are not part of it.
        max_tokens: Its longest.
        temperature: 0 is greedy.
    """

    stop: tuple[str, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0

    @classmethod
    def from_task(cls, arguments: Mapping[str, Any]) -> Self:
        """Parse the `generation_kwargs` of a task of lm-evaluation-harness.

        Raises:
            RequestError: If they ask for a manner of sampling that is not built.
        """
        wrong = [key for key in UNSUPPORTED_KEYS if arguments.get(key) not in (None, 1, 1.0, 0)]
        if wrong:
            raise RequestError(
                f"generation_kwargs: {wrong[0]}={arguments[wrong[0]]} is not supported: answers are greedy, or sampled "
                "by temperature alone"
            )
        until = arguments.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        limits = [int(arguments[key]) for key in MAX_TOKENS_KEYS if arguments.get(key) is not None]
        # As in lm-eval: no sampling unless it is asked for.
        is_sampled = bool(arguments.get("do_sample"))
        return cls(
            stop=tuple(text for text in stop if text),
            max_tokens=limits[0] if limits else DEFAULT_MAX_TOKENS,
            temperature=float(arguments.get("temperature") or 0.0) if is_sampled else 0.0,
        )


def write_continuations(
    model: LanguageModel,
    form: PromptForm,
    contexts: Sequence[tuple[Sequence[int], WritingLimits]],
) -> Iterator[tuple[int, str]]:
    """Yield the text that a model writes after each context, without the stop string that ended it, with its index.

    Args:
        model: The model.
        form: Form in which it reads the contexts.
        contexts: Tokens of each context, whose beginning is cut if it leaves no room for the text; end and manner of
            the text.
    """
    # Where a sentinel opens the text, the next one closes it: training targets end so.
    closers = set(model.eos_token_ids)
    if form.sentinel and model.vocabulary is not None:
        closers.add(model.vocabulary.sentinels[1])
    requests = [
        _build_request(model, form, context, limits, closers) for context, limits in contexts
    ]
    for index, outcome in generate_batch(model, requests, bidirectional=form.bidirectional):
        context, limits = contexts[index]
        text = model.decode_continuation(context, outcome.spans[0])
        yield index, cut_at_stop(text, limits.stop)


def _build_request(
    model: LanguageModel,
    form: PromptForm,
    context: Sequence[int],
    limits: WritingLimits,
    closers: Collection[int],
) -> BatchRequest:
    prompt, opening = form.build_prompt(context, limits.max_tokens)

    def has_stop(tokens: Sequence[int]) -> bool:
        if not limits.stop:
            return False
        # Decoded as a whole: a stop string may be made of several tokens, and a character of several.
        text = model.decode_continuation(context, tokens)
        return any(stop in text for stop in limits.stop)

    return BatchRequest(
        tokens=prompt,
        plan=OpenedPlan(opening, tuple(closers), limits.max_tokens),
        num_positions=len(prompt) + len(opening) + limits.max_tokens,
        settings=SamplingSettings(temperature=limits.temperature),
        is_complete=has_stop,
    )


class OpenedPlan(CompletionPlan):
    """A completion behind given tokens, which may be empty.

    Args:
        opening: Tokens that the model reads after its prompt.
        stop: Ids that end the text.
        max_tokens: Maximum number of tokens.
    """

    def __init__(self, opening: Sequence[int], stop: Sequence[int], max_tokens: int) -> None:
        super().__init__(stop, max_tokens)
        self._opening = tuple(opening)

    def begin(self) -> tuple[int, ...]:
        """Return the opening."""
        return self._opening


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string in it."""
    ends = [text.index(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text
