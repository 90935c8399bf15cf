"""FlexAttention: blocks of queries and keys out of sight of each other are never computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ul2r.model.attention.backend import Backend

BLOCK = 128
"""Queries and keys of a block, FlexAttention's own default."""


def block_mask(kv_start: Tensor, kv_end: Tensor) -> BlockMask:
    """The blocks that intervals touch, and of these the ones that every query of theirs sees whole.

    They follow from the intervals' ends, in memory and time of S * S / 128 and not S * S.

    Args:
        kv_start: (B, S) int, first key each query sees.
        kv_end: (B, S) int, one past the last; kv_start < kv_end.
    """
    batch, length = kv_start.shape
    blocks = -(-length // BLOCK)
    missing = blocks * BLOCK - length
    first = functional.pad(kv_start, (0, missing))[:, :, None]  # queries past the end see no key
    end = functional.pad(kv_end, (0, missing))[:, :, None]
    begins = torch.arange(0, blocks * BLOCK, BLOCK, device=kv_start.device)
    touched = (first < begins + BLOCK) & (end > begins)  # (B, queries, key blocks)
    covered = (first <= begins) & (end >= begins + BLOCK)
    by_block = batch, blocks, BLOCK, blocks
    some = touched.view(by_block).any(dim=2)
    whole = covered.view(by_block).all(dim=2)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del h
        return (key >= kv_start[b, query]) & (key < kv_end[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has (B, 1, N), and which (B, 1, N, N), the chosen ones first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1)[:, None].int(), order[:, None].int()


class Flex(Backend[BlockMask]):
    """Torch's FlexAttention, compiled for the device; it has no backward pass on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._attention = torch.compile(flex_attention, dynamic=False)

    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> BlockMask:
        """The block mask, on the device, with ends laid out alike with and without a window: one compilation."""
        first, end = (
            bound.contiguous().to(device, non_blocking=True) for bound in (kv_start, kv_end)
        )
        return block_mask(first, end)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: BlockMask, scale: float
    ) -> Tensor:
        """Attend over the blocks in sight."""
        context: Tensor = self._attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            block_mask=prepared,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3)
