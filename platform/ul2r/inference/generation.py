"""Incremental decoding with a key-value cache, after a prompt with causal or bidirectional attention."""

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
"""Why a generated text ended: the model ended it, or it reached its token limit."""

DEFAULT_MAX_TOKENS = 64


class IncrementalDecoder:
    """Decoding state: reads a prompt at once, then one token at a time.

    With prefix-LM attention every prompt token attends to the whole prompt and every later token to all tokens before
    it. So keys and values never change once computed, and the cache gives the same logits as a full recomputation.

    Attributes:
        logits: float32 (V,), for the token after those read so far.
    """

    def __init__(self, model: LanguageModel, prompt: Sequence[int], *, bidirectional: bool) -> None:
        self._model = model
        # With the config, layers with a sliding window keep only the keys within it.
        self._cache = DynamicCache(config=model.network.config)

        # Without a mask transformers applies the causal one, by a faster kernel.
        length = len(prompt)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool) if bidirectional else None
        self.logits = self._read(prompt, mask)

    def feed(self, token: int) -> None:
        """Read one more token, which attends to all tokens before it."""
        # A single query attends to all keys in the cache, so it needs no mask.
        self.logits = self._read([token], None)

    def _read(self, tokens: Sequence[int], mask: Tensor | None) -> Tensor:
        # The cache appends the keys of these tokens and keeps count of positions, so none are passed.
        batch = torch.tensor([tokens], dtype=torch.int64)  # (1, S)
        # On the CPU, where a seed gives the same samples whatever the model's device.
        return self._model.forward(batch, mask, self._cache, num_last=1)[0, -1].cpu()


class Sampler:
    """Selects the next token: the most likely one at temperature 0, else a seeded random one.

    Only text tokens and explicitly allowed ones are selected, so modes, sentinels and unused ids never end up in a
    generated text.
    """

    def __init__(self, model: LanguageModel, temperature: float, seed: int) -> None:
        # NaN fails the comparison too.
        if not 0 <= temperature < math.inf:
            raise RequestError(f"temperature={temperature} is out of range: choose 0 or more")
        self._is_text = model.is_text
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self, logits: Tensor, also_allowed: Collection[int]) -> int:
        """Return the id of a text token or of one in `also_allowed`.

        Args:
            logits: float32 (V,).
            also_allowed: Ids that may be selected besides text.
        """
        # A copy: the mask belongs to the model, which all requests share.
        allowed = self._is_text.clone()
        allowed[list(also_allowed)] = True
        logits = logits.masked_fill(~allowed, -torch.inf)
        if self._temperature == 0:
            return int(logits.argmax())

        # With a maximum of 0, dividing by a tiny temperature overflows to -inf at worst, never to inf or NaN.
        shifted = (logits - logits.max()).double()
        probabilities = torch.softmax(shifted / self._temperature, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
    bidirectional: bool,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that follow a prompt; a stop token is yielded and is the last one.

    Args:
        model: Model to decode with.
        prompt: At least one token.
        max_tokens: Maximum number of tokens.
        stop: Ids that end the text.
        temperature: 0 is greedy.
        seed: Seed of the sampling.
        bidirectional: True if prompt tokens attend to each other in both directions.
    """
    decoder = IncrementalDecoder(model, prompt, bidirectional=bidirectional)
    sampler = Sampler(model, temperature, seed)

    # A generator: the caller may stop early, and pays only for the tokens that it takes.
    for remaining in reversed(range(max_tokens)):
        token = sampler.sample(decoder.logits, stop)
        yield token
        # The last token is not fed: its logits are not needed, and each costs a forward pass.
        if token in stop or not remaining:
            return
        decoder.feed(token)


def resolve_max_tokens(
    model: LanguageModel,
    prompt_tokens: int,
    max_tokens: int | None,
    *,
    num_spans: int = 1,
    extra_tokens_per_span: int = 0,
) -> int:
    """Return the token limit of each generated text, after checking it against the model's maximum length.

    Args:
        model: Model whose maximum length prompt and completion share.
        prompt_tokens: Number of tokens of the prompt, including mode and sentinels.
        max_tokens: Limit in the request; None stands for `DEFAULT_MAX_TOKENS`, or fewer where fewer fit.
        num_spans: Number of texts to generate.
        extra_tokens_per_span: Tokens of each text beyond its limit, such as its sentinel.

    Raises:
        RequestError: If the prompt leaves no room, or `max_tokens` is out of range.
    """
    max_length = model.max_position_embeddings
    # Every span may reach its limit, so they share the remaining positions equally.
    room = (max_length - prompt_tokens) // num_spans - extra_tokens_per_span
    if room < 1:
        longest_prompt = max_length - num_spans * (1 + extra_tokens_per_span)
        raise RequestError(
            f"the prompt is too long: it has {prompt_tokens} tokens, and at most {longest_prompt} leave room for a "
            f"completion within the model's maximum length of {max_length}: shorten it"
        )

    if max_tokens is None:
        return min(room, DEFAULT_MAX_TOKENS)
    if not 1 <= max_tokens <= room:
        raise RequestError(
            f"max_tokens={max_tokens} is out of range: with {prompt_tokens} prompt tokens and a maximum length of "
            f"{max_length}, choose 1 to {room}"
        )
    return max_tokens
