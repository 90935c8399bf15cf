"""Decoding steps as CUDA graphs: one launch instead of hundreds.

Not run yet: there was no GPU where this was written. `tests/gpu/test_engine.py` compares it with a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ul2r.inference.engine.kv_cache import SlotCache
from ul2r.inference.engine.runner import ModelRunner

SHORTEST = 256
"""Keys of the shortest graphs; others are twice as long each."""
NUM_WARMUPS = 2


@dataclass(frozen=True)
class _Graph:
    """A captured step with its own inputs and outputs."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor
    logits: Tensor


class GraphedDecoder:
    """Decoding steps for some numbers of rows and of keys, captured at the start.

    A step of other sizes runs in the next larger graph: rows beyond the live ones compute nonsense in slots that
    nobody reads, at a place that the next answer there overwrites.

    Args:
        runner: The network.
        cache: The slots; graphs write to their memory.
        device: A CUDA device.
    """

    def __init__(self, runner: ModelRunner, cache: SlotCache, device: torch.device) -> None:
        self._runner = runner
        self._cache = cache
        self._device = device
        self._sizes = list_powers(1, cache.num_slots)
        self._lengths = list_powers(SHORTEST, cache.num_positions)
        # Graphs never run at the same time, so they share their memory. The largest comes first and sets it.
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = {
            (size, length): self._capture(size, length)
            for size in reversed(self._sizes)
            for length in reversed(self._lengths)
        }

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See `ModelRunner.decode`."""
        num_rows = len(tokens)
        size = next(size for size in self._sizes if size >= num_rows)
        length = next(length for length in self._lengths if length > max(positions))
        graph = self._graphs[size, length]
        # The rows in excess write to position 0 of free slots.
        padding = [0] * (size - num_rows)
        graph.tokens.copy_(torch.tensor([*tokens, *padding]), non_blocking=True)
        graph.positions.copy_(torch.tensor([*positions, *padding]), non_blocking=True)
        graph.graph.replay()
        return graph.logits[:num_rows].cpu()

    @torch.inference_mode()
    def _capture(self, size: int, length: int) -> _Graph:
        tokens = torch.zeros(size, dtype=torch.int64, device=self._device)
        positions = torch.zeros(size, dtype=torch.int64, device=self._device)
        # On another stream first, as PyTorch asks for: libraries allocate their workspaces in the first calls.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARMUPS):
                self._runner.forward(self._cache, tokens, positions, length)
        torch.cuda.current_stream(self._device).wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._runner.forward(self._cache, tokens, positions, length)
        return _Graph(graph, tokens, positions, logits)


def list_powers(first: int, last: int) -> list[int]:
    """Return `first`, its doubles below `last`, and `last`."""
    sizes = list[int]()
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
