"""A step's batch on the model's device: one copy from pinned memory for all arrays of all microbatches."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from ul2r.model.attention import pack_intervals
from ul2r.objective.batch import Batch


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """The arrays of a batch that the model computes with, as tensors; see `Batch`.

    Attributes:
        tokens: int32 (B, S).
        labels: int32 (B, S).
        position_ids: int32 (B, S).
        intervals: int32 (B, 2, S) from `pack_intervals`.
        loss_mask: uint8 (B, S).
        denoiser_ids: int8 (B, S).
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    intervals: Tensor
    loss_mask: Tensor
    denoiser_ids: Tensor

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
        """Return the tensors in the order of their fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def split(self, size: int) -> list[DeviceBatch]:
        """Return views of `size` rows each."""
        parts = zip(*(torch.split(tensor, size) for tensor in self.tensors()), strict=True)
        return [DeviceBatch(*tensors) for tensors in parts]


def send_batch(
    batch: Batch, device: torch.device, *, needs_host_intervals: bool = False
) -> DeviceBatch:
    """Send a batch to the model's device. On a CPU nothing is copied.

    Args:
        batch: This replica's rows of a step.
        device: The model's.
        needs_host_intervals: True if the attention backend reads the intervals in host memory.
    """
    on_host = DeviceBatch.from_batch(batch)
    if device.type == "cpu":
        return on_host

    # Only a copy from pinned memory is asynchronous. torch keeps the memory until the copy is done, and reuses it.
    packed = pack_tensors(on_host.tensors(), pin_memory=True).to(device, non_blocking=True)
    sent = DeviceBatch(*unpack_tensors(packed, on_host.tensors()))
    return replace(sent, intervals=on_host.intervals) if needs_host_intervals else sent


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
