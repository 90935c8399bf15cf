"""FlexAttention, which skips blocks of queries and keys that cannot see each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ul2r.model.attention.backend import Backend

BLOCK = 128
"""Queries and keys of a block, FlexAttention's default."""


def make_block_mask(kv_start: Tensor, kv_end: Tensor) -> BlockMask:
    """Make the mask of blocks that intervals touch, and of those that every query of the block sees entirely.

    torch's create_block_mask evaluates all S * S pairs. Blocks follow from the intervals' ends in memory and time of
    S * S / 128.

    Args:
        kv_start: (B, S) int, first key each query sees.
        kv_end: (B, S) int, one past the last; kv_start < kv_end.
    """
    batch, length = kv_start.shape
    num_blocks = -(-length // BLOCK)
    missing = num_blocks * BLOCK - length

    # Queries past the end are padded with [0, 0), which touches no block.
    start = functional.pad(kv_start, (0, missing))[:, :, None]
    end = functional.pad(kv_end, (0, missing))[:, :, None]
    block_start = torch.arange(0, num_blocks * BLOCK, BLOCK, device=kv_start.device)
    touches = (start < block_start + BLOCK) & (end > block_start)  # (B, queries, key blocks)
    covers = (start <= block_start) & (end >= block_start + BLOCK)
    by_query_block = (batch, num_blocks, BLOCK, num_blocks)
    # Padded queries cover nothing, so that the last block of queries is never full unless it has no padding.
    is_visible = touches.view(by_query_block).any(dim=2)  # (B, query blocks, key blocks)
    is_full = covers.view(by_query_block).all(dim=2)

    def is_in_interval(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del h
        return (key >= kv_start[b, query]) & (key < kv_end[b, query])

    return BlockMask.from_kv_blocks(
        *_list_blocks(is_visible & ~is_full),
        *_list_blocks(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_in_interval,
        seq_lengths=(length, length),
    )


def _list_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return each query block's number of chosen key blocks (B, 1, N) and their indices (B, 1, N, N), chosen first."""
    # A BlockMask reads only as many indices as it has chosen blocks; stable, so that these stay in the order of the
    # keys.
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1)[:, None].int(), order[:, None].int()


class Flex(Backend[BlockMask]):
    """Backend on torch's FlexAttention, compiled for the device; it has no backward pass on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._attention = torch.compile(flex_attention, dynamic=False)

    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> BlockMask:
        """Make the block mask on the device."""
        # Without a window these are strided views, with one they are not: each layout would compile the kernel again.
        start, end = (
            bound.contiguous().to(device, non_blocking=True) for bound in (kv_start, kv_end)
        )
        return make_block_mask(start, end)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: BlockMask, scale: float
    ) -> Tensor:
        """Attend over the visible blocks."""
        context: Tensor = self._attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            block_mask=prepared,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3)
