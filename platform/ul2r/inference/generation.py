"""Incremental decoding with a key-value cache, after a prompt with causal or bidirectional attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ul2r.inference.language_model import LanguageModel
from ul2r.inference.sampling import SamplingSettings, TokenSampler


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


class Sampler(TokenSampler):
    """Sampler of a request that sets no more than temperature and seed."""

    def __init__(self, model: LanguageModel, temperature: float, seed: int) -> None:
        super().__init__(model.is_text, SamplingSettings(temperature=temperature, seed=seed))


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
