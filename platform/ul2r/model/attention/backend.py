"""Base class of the backends that compute interval attention."""

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
    """Pack a microbatch's intervals into the one tensor that passes through the model as its attention mask.

    It stays in host memory even if the model is on a GPU, so that a backend can count its segments without waiting for
    the device. It is a tensor because activation recomputation saves tensors only.

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
        self._by_window: dict[int | None, Prepared] = {}

    @abstractmethod
    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Prepared:
        """Turn a microbatch's intervals into what the kernel needs.

        Args:
            kv_start: int32 (B, S) in host memory.
            kv_end: int32 (B, S) in host memory; kv_start < kv_end.
            device: Device on which attention is computed.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, scale: float
    ) -> Tensor:
        """Attend; arguments and result are those of `__call__`, with the result of `prepare` for the intervals."""

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
            scale: Factor of the scores before the softmax.
            window: Window that clips each interval, see `clip_to_window`; None for none.

        Returns:
            (S, B, H, D).
        """
        prepared = self._prepare_once(bounds, window, query.device)
        return self.attend(query, key, value, prepared, scale)

    def _prepare_once(self, bounds: Tensor, window: int | None, device: torch.device) -> Prepared:
        """Prepare intervals for the first layer with each window, and reuse the result in the following layers."""
        # Recomputation passes another tensor object over the same memory, hence no comparison by `is`. Holding the last
        # tensor keeps its memory from being given to other intervals; results for older ones are dropped.
        if self._last is None or not _share_memory(self._last, bounds):
            self._last = bounds
            self._by_window = {}

        if window not in self._by_window:
            kv_start, kv_end = clip_to_window(bounds[:, 0].numpy(), bounds[:, 1].numpy(), window)
            self._by_window[window] = self.prepare(
                torch.from_numpy(kv_start), torch.from_numpy(kv_end), device
            )
        return self._by_window[window]


def _share_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape
