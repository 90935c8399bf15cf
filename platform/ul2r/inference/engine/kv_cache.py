"""Keys and values: of prompts, of the slots of answers in the making, and of prompts that may come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

PromptKey = tuple[int, ...]
"""All tokens of a prompt."""


@dataclass(frozen=True)
class PromptBlock:
    """A prompt that the model has read.

    Attributes:
        keys: Of each layer, (G, S, D).
        values: As `keys`.
        logits: float32 (V,), for the token after it.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, self.logits))


class SlotCache:
    """Keys and values of all slots, allocated once.

    Attributes:
        keys: Of each layer, (slots, G, positions, D).
        values: As `keys`.
        num_slots: Answers that can be in the making.
        num_positions: Longest sequence.
    """

    def __init__(self, like: PromptBlock, num_slots: int, num_positions: int) -> None:
        self.num_slots = num_slots
        self.num_positions = num_positions
        # Zeros: a key beyond a row's length has weight 0, which times NaN would be NaN.
        self.keys, self.values = (
            [t.new_zeros(num_slots, t.shape[0], num_positions, t.shape[2]) for t in tensors]
            for tensors in (like.keys, like.values)
        )

    @staticmethod
    def count_bytes(like: PromptBlock, num_positions: int) -> int:
        """Return the memory of one slot."""
        return num_positions * sum(
            t.shape[0] * t.shape[2] * t.element_size() for t in (*like.keys, *like.values)
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def write(self, slot: int, block: PromptBlock) -> None:
        """Copy a prompt to the beginning of a slot."""
        for target, source in zip(
            (*self.keys, *self.values), (*block.keys, *block.values), strict=True
        ):
            target[slot, :, : block.length] = source

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class PromptCache:
    """Prompts by all of their tokens; the least recently used ones make room.

    A bidirectional prompt can be used again as a whole only: each of its keys depends on all of its tokens.

    Args:
        max_bytes: Memory that the blocks may take; the newest is kept in any case, for the other samples of its
            request.

    Attributes:
        hits: Prompts that were found.
        misses: Prompts that were not.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[PromptKey, PromptBlock] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, tokens: Sequence[int]) -> PromptBlock | None:
        """Return a prompt's block, if it is here."""
        key = tuple(tokens)
        block = self._blocks.get(key)
        if block is None:
            self.misses += 1
            return None
        self.hits += 1
        self._blocks.move_to_end(key)
        return block

    def put(self, tokens: Sequence[int], block: PromptBlock) -> None:
        """Keep a block."""
        self._blocks[tuple(tokens)] = block
        self.num_bytes += block.num_bytes
        while self.num_bytes > self._max_bytes and len(self._blocks) > 1:
            _, oldest = self._blocks.popitem(last=False)
            self.num_bytes -= oldest.num_bytes


def round_up(number: int, step: int) -> int:
    """Return the least multiple of `step` that is not below `number`."""
    return -(-number // step) * step
