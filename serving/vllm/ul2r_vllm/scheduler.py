"""Scheduling of prompts that are read in both directions."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class PrefixScheduler(Scheduler):
    """Reads a prompt in one call, and each token behind it in a call of its own.

    A request that was preempted is read again, prompt and answer. vLLM reads both in one call, in which all tokens
    would see each other: other keys than before, and other tokens from there on. Here the prompt is read as before,
    and the answer token by token behind it, as it was generated.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401  vLLM's
        super().__init__(*args, **settings)
        assert not self.scheduler_config.enable_chunked_prefill
        # With this, `schedule` asks the method below for running and for waiting requests (0.32).
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Return how many tokens of a request are read in the next call: those of the prompt together, or one.

        Args:
            request: The request.
            num_new_tokens: Tokens that could be read.
            num_new_local_computed_tokens: Tokens that a cache holds.
            num_external_computed_tokens: Tokens that another machine holds.
        """
        assert num_new_local_computed_tokens == num_external_computed_tokens == 0
        if request.num_computed_tokens >= request.num_prompt_tokens:
            return min(num_new_tokens, 1)
        assert request.num_computed_tokens == 0, "a part of a prompt was read alone"
        # 0 if the budget of this step is too small for all of it: it waits for the next.
        num_prompt_tokens: int = request.num_prompt_tokens
        return num_prompt_tokens if num_new_tokens >= num_prompt_tokens else 0
