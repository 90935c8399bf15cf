"""Logits at some positions only.

On a vocabulary of 49,000 they are a fifth of a small model's FLOPs, on one of 262,000 two thirds, and of a denoiser's
row only the targets need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


def select_positions(
    hidden_states: Tensor, labels: Tensor | None, index: Tensor, *, is_sharded: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states and labels of some positions, as a microbatch of one row.

    Args:
        hidden_states: (S, B, H), or (S / tensor ranks, B, H) with sequence parallelism.
        labels: (B, S), if losses are to be computed.
        index: Places in the flattened (S, B), int (N,), without repetitions.
        is_sharded: Whether there is sequence parallelism.

    Returns:
        (N, 1, H) on every tensor rank, and (1, N).
    """
    if is_sharded:
        # What the output layer would begin with. Targets lie at the ends of rows: ranks that each chose among their own
        # positions would have to agree on the largest number. The backward pass sums over tensor ranks, each of which
        # computes the gradient by its part of the vocabulary, and scatters.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
    chosen = hidden_states.flatten(0, 1).index_select(0, index)[:, None]
    if labels is None:
        return chosen, None
    return chosen, labels.t().flatten().index_select(0, index)[None]


@contextmanager
def gather_no_input(layer: ColumnParallelLinear) -> Iterator[None]:
    """Let a layer with sequence parallelism take its input as it is during the forward pass, which is whole already.

    `select_positions` has gathered it, and its backward pass sums the gradient, so that the layer must do neither.
    Without sequence parallelism nothing changes. The layer's forward pass reads both settings, its backward pass none
    (Megatron-Core 0.16.1 and 0.19.2).
    """
    is_sharded = layer.sequence_parallel
    reduces_nothing = layer.disable_grad_reduce
    if is_sharded:
        layer.sequence_parallel = False
        layer.disable_grad_reduce = True
    try:
        yield
    finally:
        layer.sequence_parallel = is_sharded
        layer.disable_grad_reduce = reduces_nothing
