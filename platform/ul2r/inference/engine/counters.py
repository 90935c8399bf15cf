"""Counts of an engine since its start."""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.1


@dataclass
class EngineStatistics:
    """Counts since the start, written by the engine's thread.

    Attributes:
        steps: Decoding steps.
        decoded_tokens: Rows of all decoding steps.
        generated_tokens: Sampled tokens.
        prompt_tokens: Tokens of prompts that were read, without those found in the cache.
        finished: Answers that ended.
        cancelled: Requests whose client went away.
        expired: Requests whose time was over.
        refused: Requests that found the queue full.
        mean_seconds: Time that an answer has a slot, an exponential mean.
    """

    steps: int = 0
    decoded_tokens: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    mean_seconds: float = 1.0

    def record_answer(self, seconds: float) -> None:
        """Count an answer that had its slot for some seconds."""
        self.finished += 1
        self.mean_seconds += SMOOTHING * (seconds - self.mean_seconds)
