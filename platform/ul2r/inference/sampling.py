"""Selection of the next token: the settings of a request, and their application to logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ul2r.errors import RequestError

MAX_LOGIT_BIAS = 100.0
MAX_REPETITION_PENALTY = 100.0
"""Beyond it, and below its inverse, logits could leave the range of float32: no token has a probability then."""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a request, by OpenAI's names where it has them; the defaults are greedy.

    They apply in this order: repetition, presence and frequency penalties, `logit_bias`, temperature, `top_k`,
    `top_p`, `min_p`.

    Attributes:
        temperature: 0 is greedy.
        top_k: The most likely tokens to choose from; 0 is all.
        top_p: Choose from the most likely tokens that have this probability together (arXiv 1904.09751).
        min_p: Least probability of a token, as a fraction of the most likely one's (arXiv 2407.01082).
        repetition_penalty: Divides positive logits of tokens in the prompt or the answer, multiplies negative ones
            (CTRL, arXiv 1909.05858, 4.1). Tokens that are scored or typed already belong to the prompt.
        presence_penalty: Subtracted once from the logits of tokens in the answer, as OpenAI and vLLM do.
        frequency_penalty: Subtracted for each time that a token is in the answer.
        logit_bias: Added to the logits of some tokens.
        seed: Seed of the sampling.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_plain_greedy(self) -> bool:
        """True if the answer is the most likely token of the model's own logits."""
        return self.temperature == 0 and not self.has_penalties and not self.logit_bias

    def check(self, vocabulary_size: int) -> None:
        """Refuse values out of range.

        Raises:
            RequestError: If there is one.
        """
        # NaN fails each comparison.
        for name, is_valid, choice in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition_penalty",
                1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
                "0.01 to 100",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
        ):
            if not is_valid:
                raise RequestError(f"{name}={getattr(self, name)} is out of range: choose {choice}")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocabulary_size:
                raise RequestError(
                    f"logit_bias: the model has no token {token}: choose 0 to {vocabulary_size - 1}"
                )
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise RequestError(
                    f"logit_bias: {bias} of token {token} is out of range: choose -100 to 100"
                )


class TokenSampler:
    """Selects the tokens of one answer.

    Only text tokens and explicitly allowed ones are selected, so modes, sentinels and unused ids never end up in a
    generated text.

    Args:
        is_text: bool (V,), True for ids that stand for text.
        settings: Those of the request.
        prompt: Tokens that the request gives, which the repetition penalty counts.

    Raises:
        RequestError: If a setting is out of range.
    """

    def __init__(
        self, is_text: Tensor, settings: SamplingSettings, prompt: Sequence[int] = ()
    ) -> None:
        settings.check(len(is_text))
        self.settings = settings
        self._is_text = is_text
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._counts = torch.zeros(len(is_text)) if settings.has_penalties else None

    def sample(self, logits: Tensor, also_allowed: Collection[int]) -> int:
        """Return the id of a text token or of one in `also_allowed`.

        Args:
            logits: float32 (V,), on the CPU.
            also_allowed: Ids that may be selected besides text.
        """
        settings = self.settings
        if self._counts is not None:
            logits = self._penalize(logits, self._counts)
        if settings.logit_bias:
            logits = logits.clone()
            logits[list(settings.logit_bias)] += torch.tensor(list(settings.logit_bias.values()))

        # A copy: the mask belongs to the model, which all requests share.
        allowed = self._is_text.clone()
        allowed[list(also_allowed)] = True
        token = self._select(logits.masked_fill(~allowed, -torch.inf))
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalize(self, logits: Tensor, counts: Tensor) -> Tensor:
        settings = self.settings
        is_answered = counts > 0
        is_seen = is_answered.clone()
        is_seen[self._prompt] = True
        factor = settings.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(is_seen, repeated, logits)
        return (
            logits - settings.presence_penalty * is_answered - settings.frequency_penalty * counts
        )

    def _select(self, logits: Tensor) -> int:
        """Return a token by temperature and truncation; the logits of those not allowed are -inf."""
        settings = self.settings
        if settings.temperature == 0:
            return int(logits.argmax())

        # With a maximum of 0, dividing by a tiny temperature overflows to -inf at worst, never to inf or NaN.
        shifted = (logits - logits.max()).double()
        probabilities = torch.softmax(shifted / settings.temperature, dim=-1)
        if settings.top_k or settings.top_p < 1 or settings.min_p:
            probabilities = _truncate(probabilities, settings)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _truncate(probabilities: Tensor, settings: SamplingSettings) -> Tensor:
    """Return probabilities, 0 for the tokens that `top_k`, `top_p` and `min_p` leave out; not normalized again."""
    # Stable, so that ties are cut the same way in every place.
    ordered, order = probabilities.sort(descending=True, stable=True)
    if settings.top_k:
        ordered[settings.top_k :] = 0
        ordered /= ordered.sum()
    if settings.top_p < 1:
        # The token that reaches the sum belongs to it.
        ordered[ordered.cumsum(0) - ordered >= settings.top_p] = 0
    if settings.min_p:
        ordered[ordered < settings.min_p * ordered[0]] = 0
    return torch.zeros_like(probabilities).scatter_(0, order, ordered)
