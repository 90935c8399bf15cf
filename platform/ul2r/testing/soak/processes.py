"""The processes of a local Ray Serve: found, killed, and weighed."""

from __future__ import annotations

import signal
import statistics
from dataclasses import dataclass, field

import psutil

REPLICA = "ray::ServeReplica:"
PROXY = "ray::ProxyActor"
ROUTER = "router"


def find_processes(root: int, title: str) -> list[psutil.Process]:
    """Return the descendants of a process whose title begins so, oldest first."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                found.append((process.create_time(), process.pid, process))
        except psutil.Error:
            # It has ended meanwhile.
            continue
    return [process for *_, process in sorted(found, key=lambda item: item[:2])]


@dataclass
class Processes:
    """Replicas that are killed, and those that stay with the proxy.

    Args:
        root: Process that started Ray.
        victim: Part of the title of the replicas of which all but `num_survivors` are killed in turn.
        num_survivors: Replicas of that title that are never killed.

    Attributes:
        survivors: Processes that live to the end.
    """

    root: int
    victim: str
    num_survivors: int
    survivors: list[psutil.Process] = field(init=False)
    _weights: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        replicas = find_processes(self.root, REPLICA)
        victims = [process for process in replicas if self.victim in process.cmdline()[0]]
        self._num_replicas = len(replicas)
        kept = victims[: self.num_survivors]
        others = [process for process in replicas if process not in victims]
        self.survivors = kept + others + find_processes(self.root, PROXY)
        # The title goes on with the call that is running.
        self._names = {p.pid: f"{p.cmdline()[0].split('.')[0]} {p.pid}" for p in self.survivors}
        assert len(victims) > self.num_survivors, f"nobody to kill among {replicas}"

    @property
    def num_missing(self) -> int:
        """Replicas that have not been replaced yet."""
        return self._num_replicas - len(find_processes(self.root, REPLICA))

    def kill_one(self) -> None:
        """Kill the oldest replica that is no survivor."""
        victims = [p for p in find_processes(self.root, REPLICA) if p not in self.survivors]
        victims[0].send_signal(signal.SIGKILL)

    def weigh(self) -> None:
        """Note the memory of all survivors."""
        for process in self.survivors:
            self._weights.setdefault(process.pid, []).append(process.memory_info().rss / 2**20)

    def list_weights(self, num_parts: int) -> dict[str, list[float]]:
        """Return the memory of each survivor in MiB by its name: the median of each part of the time."""
        listed = dict[str, list[float]]()
        for process in self.survivors:
            weights = self._weights[process.pid]
            size = max(1, len(weights) // num_parts)
            parts = [weights[start : start + size] for start in range(0, len(weights), size)]
            listed[self._names[process.pid]] = list(map(statistics.median, parts[:num_parts]))
        return listed
