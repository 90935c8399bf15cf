"""Memory of an engine: decided and allocated once, at its start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ul2r.errors import ServiceError
from ul2r.inference.engine.cuda_graphs import GraphedDecoder
from ul2r.inference.engine.kv_cache import PromptBlock, PromptCache, SlotCache, round_up
from ul2r.inference.engine.runner import LENGTH_STEP, ModelRunner

if TYPE_CHECKING:
    from ul2r.inference.language_model import LanguageModel

logger = logging.getLogger(__name__)

GIB = 2**30
GPU_FRACTION = 0.8
"""Share of a GPU's free memory that slots take if nothing else is said; the rest is for prompts and graphs."""


@dataclass(frozen=True)
class EngineParts:
    """Network and memory of an engine.

    Attributes:
        runner: The network.
        slots: Keys and values of live answers.
        prompts: Keys and values of prompts that may come again.
        decode: One decoding step: tokens and positions of all rows to logits, see `ModelRunner.decode`.
        is_text: bool (V,), ids that stand for text.
    """

    runner: ModelRunner
    slots: SlotCache
    prompts: PromptCache
    decode: Callable[[Sequence[int], Sequence[int]], Tensor]
    is_text: Tensor


def build_engine_parts(
    model: LanguageModel,
    *,
    num_slots: int,
    kv_bytes: int | None,
    prompt_cache_bytes: int,
) -> EngineParts:
    """Take over a model's network and allocate the memory of an engine.

    Args:
        model: The model; its own `forward` must not be called any more.
        num_slots: Most answers that are generated at once; fewer if fewer fit.
        kv_bytes: Memory for their keys and values; None is no limit on a CPU, and 80 % of the free memory on a GPU.
        prompt_cache_bytes: Memory for prompts that may come again.

    Raises:
        ServiceError: If not even one slot fits.
    """
    runner = ModelRunner(model)
    # A prompt of one token shows the shapes of every layer, whatever the family.
    like: PromptBlock = runner.read_prompt([0])
    num_positions = round_up(model.max_position_embeddings, LENGTH_STEP)
    bytes_per_slot = SlotCache.count_bytes(like, num_positions)
    if kv_bytes is None and model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        kv_bytes = int(free * GPU_FRACTION)
    if kv_bytes is not None:
        num_slots = min(num_slots, kv_bytes // bytes_per_slot)
    if num_slots < 1:
        raise ServiceError(
            f"keys and values of one answer of {model.max_position_embeddings} tokens take "
            f"{bytes_per_slot / GIB:.2f} GiB: give them more memory, or a lower max_model_len"
        )

    slots = SlotCache(like, num_slots, num_positions)
    logger.info(
        "%d slots of %d tokens: %.2f GiB for keys and values, up to %.2f GiB for prompts that may come again",
        num_slots,
        model.max_position_embeddings,
        slots.num_bytes / GIB,
        prompt_cache_bytes / GIB,
    )
    return assemble_parts(model, runner, slots, prompt_cache_bytes)


def assemble_parts(
    model: LanguageModel, runner: ModelRunner, slots: SlotCache, prompt_cache_bytes: int
) -> EngineParts:
    """Return the parts of an engine whose network is taken over and whose slots are allocated."""
    decode: Callable[[Sequence[int], Sequence[int]], Tensor] = partial(runner.decode, slots)
    # Experts are chosen on the host, which a graph cannot wait for.
    if model.device.type == "cuda" and not runner.has_experts:
        decode = GraphedDecoder(runner, slots, model.device).decode
    return EngineParts(runner, slots, PromptCache(prompt_cache_bytes), decode, model.is_text)
