"""Texts that a model writes after a context, until one of several stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ul2r.errors import RequestError
from ul2r.evaluation.few_shot.prompting import PromptForm
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder, Sampler

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


def write_continuation(
    model: LanguageModel, form: PromptForm, context: Sequence[int], limits: WritingLimits
) -> str:
    """Return the text that a model writes after a context, without the stop string that ended it.

    Args:
        model: The model.
        form: Form in which it reads the context.
        context: Tokens of the context; its beginning is cut if it leaves no room for `limits.max_tokens`.
        limits: End and manner of the text.
    """
    prompt, opening = form.build_prompt(context, limits.max_tokens)
    decoder = IncrementalDecoder(model, prompt, bidirectional=form.bidirectional)
    for token in opening:
        decoder.feed(token)
    sampler = Sampler(model, limits.temperature, seed=0)

    # Where a sentinel opens the text, the next one closes it: training targets end so.
    closers = set(model.eos_token_ids)
    if opening and model.vocabulary is not None:
        closers.add(model.vocabulary.sentinels[1])
    ids: list[int] = []
    text = ""
    while len(ids) < limits.max_tokens:
        token = sampler.sample(decoder.logits, closers)
        if token in closers:
            break
        ids.append(token)
        # Decoded as a whole: a stop string may be made of several tokens, and a character of several.
        text = model.decode_continuation(context, ids)
        if any(stop in text for stop in limits.stop):
            break
        if len(ids) < limits.max_tokens:
            decoder.feed(token)
    return cut_at_stop(text, limits.stop)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop string in it."""
    ends = [text.index(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text
