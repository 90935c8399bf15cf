"""How fast steps go, and how much of their time is spent on waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Sums up steps until it is asked; measuring and saving between them do not count."""

    def __init__(self) -> None:
        self._step_s = self._wait_s = self._tokens = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The part of a step in which its rows are waited for."""
        began = time.perf_counter()
        yield
        waited = time.perf_counter() - began
        self._wait_s += waited
        self._step_s += waited

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """The rest of a step on `tokens` row positions of all replicas."""
        began = time.perf_counter()
        yield
        self._step_s += time.perf_counter() - began
        self._tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Row positions a second, and the waiting share of their time, of the steps since it was last asked."""
        found = {
            "train/tokens_per_second": self._tokens / self._step_s,
            "train/data_wait_share": self._wait_s / self._step_s,
        }
        self._step_s = self._wait_s = self._tokens = 0.0
        return found
