"""Base class of the backends that compute interval attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Prepared = TypeVar("Prepared")


def pack_intervals(kv_start: npt.NDArray[np.int32], kv_end: npt.NDArray[np.int32]) -> Tensor:
    """Pack intervals into the one tensor that passes through the model as its attention mask.

    It is a tensor because activation recomputation saves tensors only. It may be on the model's device, unless the
    backend is one that `core.needs_host_intervals` names.

    Args:
        kv_start: First key each query sees, int32 (B, S).
        kv_end: One past the last, int32 (B, S).

    Returns:
        int32 (B, 2, S).
    """
    return torch.from_numpy(np.stack([kv_start, kv_end], axis=1))


class Backend(ABC, Generic[Prepared]):
    """One way to compute interval attention, shared by all layers of all chunks of a model.

    Attributes:
        num_kept: Microbatches whose prepared intervals are kept: as many as are worked on at a time.
    """

    def __init__(self) -> None:
        self.num_kept = 1
        # By address and shape of the intervals: these, and what was prepared of them for each window; oldest first.
        self._kept: dict[tuple[int, torch.Size], tuple[Tensor, dict[int | None, Prepared]]] = {}

    @abstractmethod
    def prepare(self, kv_start: Tensor, kv_end: Tensor, device: torch.device) -> Prepared:
        """Turn a microbatch's intervals into what the kernel needs.

        Args:
            kv_start: int32 (B, S).
            kv_end: int32 (B, S); kv_start < kv_end.
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
            window: Window that clips each interval, see `ul2r.model.window.clip_to_window`; None for none.

        Returns:
            (S, B, H, D).
        """
        prepared = self._prepare_once(bounds, window, query.device)
        return self.attend(query, key, value, prepared, scale)

    def _prepare_once(self, bounds: Tensor, window: int | None, device: torch.device) -> Prepared:
        """Prepare a microbatch's intervals for the first layer with each window.

        The result is used by all layers that follow, in every chunk of the model and when activations are recomputed.
        """
        # Recomputation passes another tensor object over the same memory, hence no comparison by `is`. Holding the
        # tensor keeps its memory from being given to other intervals.
        key = bounds.data_ptr(), bounds.shape
        if key not in self._kept:
            self._kept[key] = bounds, {}
            # Microbatches are finished in the order in which they were begun: the first one will not be needed again.
            if len(self._kept) > self.num_kept:
                del self._kept[next(iter(self._kept))]

        _, by_window = self._kept[key]
        if window not in by_window:
            kv_start, kv_end = _clip_to_window(bounds[:, 0], bounds[:, 1], window)
            by_window[window] = self.prepare(kv_start, kv_end, device)
        return by_window[window]


def _clip_to_window(kv_start: Tensor, kv_end: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Clip int32 (B, S) intervals as `ul2r.model.window.clip_to_window` does, on their device."""
    if window is None:
        return kv_start, kv_end
    query = torch.arange(kv_start.shape[-1], dtype=kv_start.dtype, device=kv_start.device)
    return torch.maximum(kv_start, query - window + 1), torch.minimum(kv_end, query + window)
