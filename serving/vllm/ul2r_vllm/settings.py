"""Settings of vLLM for networks that read prompts in both directions."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

SCHEDULER = "ul2r_vllm.scheduler.PrefixScheduler"
CONSTRAINT = "ul2r_vllm.constraint:AnswerConstraint"


class PrefixSettings(VerifyAndUpdateConfig):
    """Called by vLLM with all settings, before anything is loaded; see `MODELS_CONFIG_MAP` (0.32)."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set what such a network needs.

        Raises:
            ValueError: If speculative decoding is on: its drafts would see each other.
        """
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding reads several tokens of an answer at once, which then see each other: leave "
                "it out with a model whose prompts are read in both directions"
            )
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = SCHEDULER
        # The scheduler is not the asynchronous one.
        scheduler.async_scheduling = False
        # Parts of a prompt that are read before others would not see these. vLLM finds that out itself, except where
        # all layers have a sliding window.
        scheduler.enable_chunked_prefill = False
        vllm_config.cache_config.enable_prefix_caching = False
        # The longest prompt has to fit besides one token of every other answer: it could wait forever.
        longest = vllm_config.model_config.max_model_len + scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
        scheduler.max_num_scheduled_tokens = scheduler.max_num_batched_tokens
        # Named, so that vLLM keeps the tokens so far up to date for it.
        processors = vllm_config.model_config.logits_processors or []
        if CONSTRAINT not in processors:
            vllm_config.model_config.logits_processors = [*processors, CONSTRAINT]
