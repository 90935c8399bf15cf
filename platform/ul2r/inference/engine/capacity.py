"""Bound on the requests that an engine takes: those in slots, and those that wait for one."""

from __future__ import annotations

from dataclasses import dataclass

from ul2r.errors import RequestError
from ul2r.inference.engine.counters import EngineStatistics
from ul2r.inference.engine.request import QueueFullError

MAX_RETRY_S = 60


@dataclass(frozen=True)
class Capacity:
    """Places of an engine.

    Attributes:
        num_slots: Requests that run at once.
        max_waiting: Requests that may wait; more are refused.
    """

    num_slots: int
    max_waiting: int

    def check_size(self, num_requests: int) -> None:
        """Refuse requests of one call that never have room together.

        Raises:
            RequestError: If they are more than all places.
        """
        places = self.num_slots + self.max_waiting
        # Not `QueueFullError`: who comes again later would come in vain.
        if num_requests > places:
            raise RequestError(
                f"the request asks for {num_requests} answers (n for each prompt), and at most {places} have room: "
                "ask for fewer"
            )

    def check_room(
        self, num_requests: int, num_running: int, num_waiting: int, statistics: EngineStatistics
    ) -> None:
        """Refuse requests that have no room now, and count that.

        Args:
            num_requests: The new ones.
            num_running: Requests in slots.
            num_waiting: Requests that wait; as many as there are free slots do so for an instant.
            statistics: The engine's.

        Raises:
            QueueFullError: With the seconds after which to come again.
        """
        if num_running + num_waiting + num_requests <= self.num_slots + self.max_waiting:
            return
        statistics.refused += 1
        seconds = round(num_waiting / self.num_slots * statistics.mean_seconds)
        raise QueueFullError(num_waiting, max(1, min(MAX_RETRY_S, seconds)))
