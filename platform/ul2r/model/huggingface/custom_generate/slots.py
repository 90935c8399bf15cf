"""Tokens that may follow: text and its end in a continuation, sentinels and spans in slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from ul2r.model.huggingface.custom_generate.settings import SETTINGS


class Slots:
    """Tokens of a text with slots, and the sentinels around their spans.

    Sentinels come in order whatever the model prefers, and a span has at least one token: so every slot is filled.
    """

    def __init__(self, parts: Sequence[list[int]]) -> None:
        """Take the tokens of the parts around the slots."""
        self.parts = parts
        self.num_slots = len(parts) - 1
        # The prompt ends in a sentinel, as all inputs in training: that of the last slot, or one more after text.
        self._sentinels: list[int] = SETTINGS.sentinels[: self.num_slots + bool(parts[-1])]
        self.openers = self._sentinels[: self.num_slots]
        # A span ends where the next begins, the last one at the sentinel after the text, or at eos.
        self.closers = [*self._sentinels, SETTINGS.eos][1 : self.num_slots + 1]

    def interleave(self) -> list[int]:
        """Return the parts with a sentinel in each slot."""
        return _alternate(self.parts, [[token] for token in self._sentinels])

    def is_filled(self, generated: Sequence[int]) -> bool:
        """Return whether the last slot is closed."""
        return self.closers[-1] in generated

    def read(self, generated: Sequence[int]) -> list[list[int]]:
        """Return the span of each slot."""
        spans: list[list[int]] = []
        for token in itertools.takewhile(lambda token: token != self.closers[-1], generated):
            if token in self.openers:
                spans.append([])
            else:
                spans[-1].append(token)
        return spans

    def join(self, spans: Sequence[list[int]]) -> list[int]:
        """Return the text with its slots filled."""
        return _alternate(self.parts, spans)


class TextOnly(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Leaves text and its end, after a prefix that is forced."""

    def __init__(self, prefix: Sequence[int], prompt_length: int) -> None:
        """Take the first generated tokens, and the length of prompts."""
        self._prefix = prefix
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, float (B, V)."""
        step = input_ids.shape[1] - self._prompt_length
        if step < len(self._prefix):
            return _force(scores, self._prefix[step])
        # The span of a sentinel has at least one token.
        may_end = not self._prefix or step > len(self._prefix)
        return _allow(scores, [SETTINGS.eos] if may_end else [])


class SlotFiller(LogitsProcessor):  # type: ignore[misc]  # as above
    """Leads each row through its slots: sentinel, text, next sentinel, and so on."""

    def __init__(self, slots: Sequence[Slots], prompt_length: int, limit: int) -> None:
        """Take the slots of each text, the length of prompts, and the most tokens of a span."""
        self._slots = slots
        self._prompt_length = prompt_length
        self._limit = limit

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, float (B, V)."""
        copies = len(input_ids) // len(self._slots)
        rows = enumerate(input_ids[:, self._prompt_length :].tolist())
        return torch.stack(
            [
                self._process(self._slots[row // copies], generated, scores[row])
                for row, generated in rows
            ]
        )

    def _process(self, slots: Slots, generated: list[int], scores: Tensor) -> Tensor:
        if not generated:
            return _force(scores, slots.openers[0])
        if slots.is_filled(generated):
            return scores  # of padding

        # Sentinels are never part of a span.
        begun = [place for place, token in enumerate(generated) if token in slots.openers]
        closer = slots.closers[len(begun) - 1]
        length = len(generated) - 1 - begun[-1]
        if length == self._limit:
            return _force(scores, closer)
        return _allow(scores, [closer] if length else [])


class SlotsFilled(StoppingCriteria):  # type: ignore[misc]  # as above
    """Ends each row when its last slot is closed."""

    # transformers pads rows that have ended if a criterion has this attribute.
    eos_token_id = None

    def __init__(self, slots: Sequence[Slots], prompt_length: int) -> None:
        """Take the slots of each text, and the length of prompts."""
        self._slots = slots
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object, **_: Any) -> Tensor:  # noqa: ANN401, ARG002  as called
        """Return which rows have ended, bool (B,)."""
        copies = len(input_ids) // len(self._slots)
        rows = enumerate(input_ids[:, self._prompt_length :].tolist())
        ended = [self._slots[row // copies].is_filled(generated) for row, generated in rows]
        return torch.tensor(ended, device=input_ids.device)


def _alternate(parts: Sequence[list[int]], between: Sequence[list[int]]) -> list[int]:
    """Return the tokens of parts and of what is between them, beginning with a part."""
    tokens: list[int] = []
    for part, other in itertools.zip_longest(parts, between):
        tokens += part if other is None else [*part, *other]
    return tokens


def _allow(scores: Tensor, also: Sequence[int]) -> Tensor:
    """Return scores that leave text and the tokens in `also`."""
    allowed = torch.ones(scores.shape[-1], dtype=torch.bool, device=scores.device)
    for first, end in SETTINGS.not_text:
        allowed[first:end] = False
    allowed[list(also)] = True
    return scores.masked_fill(~allowed, -torch.inf)


def _force(scores: Tensor, token: int) -> Tensor:
    """Return scores that leave one token."""
    forced = torch.full_like(scores, -torch.inf)
    forced[..., token] = 0
    return forced
