"""Answers to a list of prompts, many at once; the model can be used as before afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ul2r.inference.engine.engine import Engine
from ul2r.inference.engine.kv_cache import SlotCache, round_up
from ul2r.inference.engine.memory import GPU_FRACTION, assemble_parts
from ul2r.inference.engine.request import GenerationRequest, Outcome, TokenLogprobs
from ul2r.inference.engine.runner import LENGTH_STEP, ModelRunner
from ul2r.inference.language_model import LanguageModel
from ul2r.inference.plans import Plan
from ul2r.inference.sampling import SamplingSettings

MAX_ANSWERS = {"cpu": 32, "cuda": 128}
"""Answers that are in the making at once, by the type of the device, if they fit the memory."""
CPU_KV_BYTES = 2**31
"""Memory for keys and values of answers on a CPU, unless a single one takes more."""


@dataclass(frozen=True)
class BatchRequest:
    """A prompt to answer.

    Attributes:
        tokens: The prompt; at least one token.
        plan: State of its answer, which is used up.
        num_positions: Longest sequence of prompt and answer.
        settings: How tokens are sampled; by default greedily.
        is_complete: Called with the tokens of the last span after each of them; the answer ends where it returns True.
    """

    tokens: Sequence[int]
    plan: Plan
    num_positions: int
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    is_complete: Callable[[Sequence[int]], bool] = lambda _: False


@dataclass
class _Collector:
    """Listener of one request, which keeps its end; see `ul2r.inference.engine.Listener`."""

    index: int
    request: BatchRequest
    done: list[tuple[int, Outcome]] = field(default_factory=list)

    def on_token(self, plan: Plan, span: int, token: int, logprobs: TokenLogprobs | None) -> bool:  # noqa: ARG002  the interface's
        return self.request.is_complete(plan.spans[span])

    def on_finish(self, outcome: Outcome) -> None:
        self.done.append((self.index, outcome))

    def on_error(self, error: Exception) -> None:
        raise error


def generate_batch(
    model: LanguageModel, requests: Sequence[BatchRequest], *, bidirectional: bool
) -> Iterator[tuple[int, Outcome]]:
    """Yield the answers to all requests as they end, each with its request's index.

    Each has the tokens that it would get alone. Until the last one is taken the model computes nothing else.

    Args:
        model: The model.
        requests: The requests; equal prompts next to each other are read once.
        bidirectional: True if prompts are read in both directions.
    """
    if not requests:
        return
    runner = ModelRunner(model, bidirectional=bidirectional, borrow=True)
    try:
        # Lengths of a power of two, since all slots are as long as the longest of their answers. The longest first:
        # what does not fit the memory fails at once.
        groups: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[(request.num_positions - 1).bit_length()].append(index)
        for length in sorted(groups, reverse=True):
            yield from _answer_group(model, runner, requests, groups[length])
    finally:
        runner.give_back()


def _answer_group(
    model: LanguageModel,
    runner: ModelRunner,
    requests: Sequence[BatchRequest],
    group: Sequence[int],
) -> Iterator[tuple[int, Outcome]]:
    num_positions = max(requests[index].num_positions for index in group)
    slots = _allocate_slots(model, runner, len(group), round_up(num_positions, LENGTH_STEP))
    # Of prompts only the newest is kept, for other answers to it.
    engine = Engine(assemble_parts(model, runner, slots, prompt_cache_bytes=0), len(group))
    done: list[tuple[int, Outcome]] = []
    engine.submit(
        [
            GenerationRequest(
                request.tokens, request.plan, request.settings, _Collector(index, request, done)
            )
            for index, request in ((index, requests[index]) for index in group)
        ]
    )
    while engine.has_work:
        engine.step()
        yield from done
        done.clear()


def _allocate_slots(
    model: LanguageModel, runner: ModelRunner, num_requests: int, num_positions: int
) -> SlotCache:
    # A prompt of one token shows the shapes of every layer, whatever the family.
    like = runner.read_prompt([0])
    kv_bytes = CPU_KV_BYTES
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        kv_bytes = int(free * GPU_FRACTION)
    num_fitting = kv_bytes // SlotCache.count_bytes(like, num_positions)
    num_slots = min(num_requests, MAX_ANSWERS.get(model.device.type, MAX_ANSWERS["cuda"]))
    return SlotCache(like, max(1, min(num_slots, num_fitting)), num_positions)
