"""A step's batch on the model's device: one copy from pinned memory for all arrays of all microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ul2r.model.attention import pack_intervals
from ul2r.objective.batch import Batch

NUM_OUTPUT_SIZES = 32
"""Numbers of positions that a microbatch's logits may be computed at.

The number is rounded up to one of few: on a GPU memory is reused and kernels are compiled by shape, and round sizes
suit matrix products. It costs 1.6 % of the positions on average.
"""


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """The arrays of a batch or microbatch that the model computes with, as tensors; see `Batch`.

    Attributes:
        tokens: int32 (B, S).
        labels: int32 (B, S).
        position_ids: int32 (B, S).
        intervals: int32 (B, 2, S) from `pack_intervals`.
        loss_mask: uint8 (B, S).
        denoiser_ids: int8 (B, S).
        output_index: int32 (N,) from `locate_outputs`, of a microbatch; None if logits are computed everywhere.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    intervals: Tensor
    loss_mask: Tensor
    denoiser_ids: Tensor
    output_index: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: Batch) -> DeviceBatch:
        """Return tensors in host memory; all but the intervals share the batch's."""
        return cls(
            tokens=_from_array(batch.tokens),
            labels=_from_array(batch.labels),
            position_ids=_from_array(batch.position_ids),
            intervals=pack_intervals(batch.kv_start, batch.kv_end),
            loss_mask=_from_array(batch.loss_mask),
            denoiser_ids=_from_array(batch.denoiser_ids),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors with rows, in the order of their fields."""
        names = [field.name for field in fields(self) if field.name != "output_index"]
        return tuple(getattr(self, name) for name in names)

    def split(self, output_indices: Sequence[Tensor | None]) -> list[DeviceBatch]:
        """Return views of microbatches of equal size, one for each element of `output_indices`."""
        size = len(self.tokens) // len(output_indices)
        parts = zip(*(torch.split(tensor, size) for tensor in self.tensors()), strict=True)
        return [
            replace(DeviceBatch(*tensors), output_index=index)
            for tensors, index in zip(parts, output_indices, strict=True)
        ]

    def select_outputs(self, values: Tensor) -> Tensor:
        """Return what belongs to the positions at which logits are computed, in the order of the model's losses.

        Args:
            values: (B, S).

        Returns:
            (1, N), or `values` if there is no `output_index`.
        """
        if self.output_index is None:
            return values
        return values.t().flatten().index_select(0, self.output_index)[None]


def send_batch(
    batch: Batch,
    device: torch.device,
    micro_batch_size: int,
    *,
    needs_host_intervals: bool = False,
) -> list[DeviceBatch]:
    """Send a batch to the model's device, in one copy; return its microbatches. On a CPU nothing is copied.

    Args:
        batch: This replica's rows of a step.
        device: The model's.
        micro_batch_size: Rows of a microbatch, which divide the batch's.
        needs_host_intervals: True if the attention backend reads the intervals in host memory.
    """
    on_host = DeviceBatch.from_batch(batch)
    # Here, where the masks are in host memory: to count targets on the device would let the host wait for it.
    indices = [
        locate_outputs(batch.loss_mask[start : start + micro_batch_size])
        for start in range(0, len(batch), micro_batch_size)
    ]
    host_indices = [None if index is None else torch.from_numpy(index) for index in indices]
    if device.type == "cpu":
        return on_host.split(host_indices)

    # First, since `pack_tensors` wants wide items before narrow ones.
    present = [index for index in host_indices if index is not None]
    tensors = (*present, *on_host.tensors())
    # Only a copy from pinned memory is asynchronous. torch keeps the memory until the copy is done, and reuses it.
    packed = pack_tensors(tensors, pin_memory=True).to(device, non_blocking=True)
    unpacked = iter(unpack_tensors(packed, tensors))
    sent_indices = [None if index is None else next(unpacked) for index in host_indices]
    sent = DeviceBatch(*unpacked)
    if needs_host_intervals:
        sent = replace(sent, intervals=on_host.intervals)

    # In the microbatches' order: those without an index took none.
    return sent.split(sent_indices)


def locate_outputs(loss_mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32] | None:
    """Return the positions of a microbatch at which logits are computed: its targets, and others up to a round number.

    Args:
        loss_mask: (B, S), 0 where the loss does not count.

    Returns:
        Ascending places in the flattened (S, B), the order of Megatron-Core's hidden states, int32 (N,); none of them
        twice, so that their gradients do not collide. None if these are all positions.
    """
    is_target = loss_mask.T.ravel() != 0
    num_targets = int(np.count_nonzero(is_target))
    step = max(is_target.size // NUM_OUTPUT_SIZES, 1)
    # At least one, since matrices without rows are no case that anything is tested with.
    size = min(max(-(-num_targets // step), 1) * step, is_target.size)
    if size == is_target.size:
        return None

    is_output = is_target.copy()
    is_output[np.flatnonzero(~is_target)[: size - num_targets]] = True
    return np.flatnonzero(is_output).astype(np.int32)


def pack_tensors(tensors: tuple[Tensor, ...], *, pin_memory: bool = False) -> Tensor:
    """Concatenate the bytes of tensors in host memory.

    Args:
        tensors: Contiguous; an item's size divides the bytes of all tensors before it.
        pin_memory: Whether to allocate the result in pinned memory.

    Returns:
        uint8 (bytes,).
    """
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    packed = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin_memory)
    for view, tensor in zip(unpack_tensors(packed, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed


def unpack_tensors(packed: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """Return views of the tensors that `pack_tensors` concatenated.

    Args:
        packed: uint8 (bytes,), on any device.
        like: Tensors of the same shapes and dtypes, in the same order.
    """
    views = []
    start = 0
    for tensor in like:
        end = start + tensor.nbytes
        views.append(packed[start:end].view(tensor.dtype).view(tensor.shape))
        start = end
    return views


def _from_array(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
