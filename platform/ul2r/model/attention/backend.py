"""What every way to compute interval attention has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ul2r.model.window import clip_to_window

Prepared = TypeVar("Prepared")


def pack_intervals(kv_start: npt.NDArray[np.int32], kv_end: npt.NDArray[np.int32]) -> Tensor:
    """A microbatch's intervals as the one tensor that goes through the model as its attention mask.

    It stays in the host's memory, also where the model is on a GPU: a backend can then count its segments without
    waiting for the device. As a tensor it survives activation recomputation.

    Args:
        kv_start: First key each query sees, int32 (B, S).
        kv_end: One past the last, int32 (B, S).

    Returns:
        int32 (B, 2, S).
    """
    return torch.from_numpy(np.stack([kv_start, kv_end], axis=1))


class Backend(ABC, Generic[Prepared]):
    """One way to compute interval attention, shared by all layers of a model."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._made: dict[int | None, Prepared] = {}

    @abstractmethod
    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Prepared:
        """What the kernel needs to know of a microbatch's intervals.

        Args:
            kv_start: int32 (B, S) in the host's memory.
            kv_end: int32 (B, S) likewise; kv_start < kv_end.
            device: Where the attention is computed.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, scale: float
    ) -> Tensor:
        """Attend; arguments and result are those of a call, with what `prepare` made of the intervals."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        scale: float,
        *,
        window: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (S, B, H, D).
            key: (S, B, G, D), G dividing H.
            value: (S, B, G, D).
            bounds: int32 (B, 2, S) from `pack_intervals`.
            scale: What scores are multiplied by before the softmax.
            window: What each query sees of its interval, see `clip_to_window`; None is all of it.

        Returns:
            (S, B, H, D).
        """
        prepared = self._prepared(bounds, window, query.device)
        return self.attend(query, key, value, prepared, scale)

    def _prepared(self, bounds: Tensor, window: int | None, device: torch.device) -> Prepared:
        """What was made of these intervals for a layer before, or made now, for each window that layers have.

        Recomputation passes another tensor over the same memory. The last intervals are held, so that no others can
        have their memory; of older ones nothing is kept.
        """
        if self._last is None or not _is_same_memory(self._last, bounds):
            self._last, self._made = bounds, {}
        if window not in self._made:
            kv_start, kv_end = clip_to_window(bounds[:, 0].numpy(), bounds[:, 1].numpy(), window)
            self._made[window] = self.prepare(
                torch.from_numpy(kv_start), torch.from_numpy(kv_end), device
            )
        return self._made[window]


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
