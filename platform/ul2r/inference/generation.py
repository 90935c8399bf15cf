"""Token by token from inputs read in both directions, with their keys and values kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ul2r.errors import RequestError
from ul2r.inference.language_model import LanguageModel

FinishReason = Literal["stop", "length"]
"""Why a generated text ended: the model closed it, or its token limit did."""

DEFAULT_MAX_TOKENS = 64


class IncrementalDecoder:
    """Reads the inputs once, then one token at a time.

    With prefix-LM attention each input sees all inputs and each later token all before it; so keys and values,
    once computed, never change, and the cache gives what a full recomputation would.

    Attributes:
        logits: float32 (V,), for the token after those read so far.
    """

    def __init__(self, model: LanguageModel, inputs: Sequence[int], *, bidirectional: bool) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.network.config)
        count = len(inputs)
        mask = torch.ones(1, 1, count, count, dtype=torch.bool) if bidirectional else None
        self.logits = self._read(inputs, mask)

    def feed(self, token: int) -> None:
        """Read one more token; it sees everything before it."""
        self.logits = self._read([token], None)

    def _read(self, tokens: Sequence[int], mask: Tensor | None) -> Tensor:
        batch = torch.tensor([tokens], dtype=torch.int64)  # (1, S)
        return self._model.forward(batch, mask, self._cache, last_only=True)[0, -1].cpu()


class Sampler:
    """Chooses the next token: the likeliest at temperature 0, else a seeded draw.

    Only text and the tokens explicitly allowed can be chosen, so that neither modes nor sentinels nor ids without
    a meaning get into a text.
    """

    def __init__(self, model: LanguageModel, temperature: float, seed: int) -> None:
        if not 0 <= temperature < math.inf:
            raise RequestError(f"temperature={temperature} must be a number of 0 or more")
        self._is_text = model.is_text
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor, also: Collection[int]) -> int:
        """One id, of text or of `also`; logits are float32 (V,)."""
        allowed = self._is_text.clone()
        allowed[list(also)] = True
        logits = logits.masked_fill(~allowed, -torch.inf)
        if self._temperature == 0:
            return int(logits.argmax())
        below = (logits - logits.max()).double()  # so that no temperature, however small, overflows
        chances = torch.softmax(below / self._temperature, dim=-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))


def generate(
    model: LanguageModel,
    inputs: Sequence[int],
    *,
    max_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
    bidirectional: bool,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that follow `inputs`; a token of `stop` is yielded and is the last.

    Args:
        model: Model to ask.
        inputs: One token or more.
        max_tokens: Most tokens yielded.
        stop: Ids that end the text.
        temperature: 0 is greedy.
        seed: Seed of the draws.
        bidirectional: Whether inputs see each other in both directions.
    """
    decoder = IncrementalDecoder(model, inputs, bidirectional=bidirectional)
    sampler = Sampler(model, temperature, seed)
    for left in reversed(range(max_tokens)):
        token = sampler.choose(decoder.logits, stop)
        yield token
        if token in stop or not left:
            return
        decoder.feed(token)


def resolve_max_tokens(
    model: LanguageModel, inputs: int, asked: int | None, *, spans: int = 1, marks: int = 0
) -> int:
    """Tokens that each of `spans` generated texts may have.

    Args:
        model: Model whose positions inputs and outputs share.
        inputs: Input tokens, the mode and sentinels included.
        asked: What the request asks for; None is `DEFAULT_MAX_TOKENS` or what there is room for.
        spans: Texts to generate.
        marks: Tokens besides the text that each span takes.

    Raises:
        RequestError: If the inputs leave no room, or `asked` is out of range.
    """
    room = (model.max_position_embeddings - inputs) // spans - marks
    if room < 1:
        most = model.max_position_embeddings - spans * (1 + marks)
        raise RequestError(
            f"the prompt is too long: it makes {inputs} tokens, {most} is the most that leaves room for an answer in "
            f"{model.max_position_embeddings} positions; shorten it"
        )
    if asked is None:
        return min(room, DEFAULT_MAX_TOKENS)
    if not 1 <= asked <= room:
        raise RequestError(
            f"max_tokens={asked} is out of range: with {inputs} input tokens of {model.max_position_embeddings} positions choose "
            f"1 to {room}"
        )
    return asked
