"""What the machines are busy with: memory of the workers, load of each node."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import psutil
import torch
import torch.distributed as dist

GIB = 2**30


@dataclass(frozen=True)
class _Report:
    """One worker's numbers."""

    source_tokens: int
    memory_bytes: int
    node: dict[str, float] = field(default_factory=dict)


class SystemMonitor:
    """Asks all workers together; each node's first worker speaks for its node, under the node's name.

    Names of a node's metrics begin with "system/", by which MLflow shows them on a page of their own.
    """

    def __init__(self) -> None:
        self._name = socket.gethostname()
        names = _from_all(self._name)
        self._speaks = names.index(self._name) == dist.get_rank()
        if self._speaks:
            psutil.cpu_percent()  # the first call only begins a measurement

    def metrics(self, source_tokens: int) -> tuple[int, dict[str, float]]:
        """Collective: the sum of `source_tokens` over workers, and metrics that rank 0 logs for all.

        Args:
            source_tokens: This worker's, 0 where another one counts the replica's.

        Returns:
            The sum; "train/memory_gib", the largest worker's memory (on a GPU the most that torch had allocated, on a
            CPU what the process holds); CPU and memory of each node; utilization and memory of its GPUs where
            nvidia-ml-py is installed.
        """
        reports = _from_all(
            _Report(source_tokens, _worker_memory(), self._load() if self._speaks else {})
        )
        largest = max(report.memory_bytes for report in reports)
        metrics = {"train/memory_gib": largest / GIB}
        for report in reports:
            metrics |= report.node
        return sum(report.source_tokens for report in reports), metrics

    def _load(self) -> dict[str, float]:
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "memory_used_gib": psutil.virtual_memory().used / GIB,
        }
        if find_spec("pynvml") is not None:  # to ask CUDA itself would take memory on each device
            for device in range(torch.cuda.device_count()):
                found |= _gpu_load(device)
        return {f"system/{self._name}/{name}": value for name, value in found.items()}


def _gpu_load(device: int) -> dict[str, float]:
    from pynvml import NVMLError_NotSupported  # which torch asks

    found = {f"gpu_{device}_memory_used_gib": torch.cuda.device_memory_used(device) / GIB}
    with suppress(NVMLError_NotSupported):  # of a part of a GPU, as MIG makes them
        found[f"gpu_{device}_utilization_percentage"] = torch.cuda.utilization(device)
    return found


def _worker_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _from_all(own: Any) -> list[Any]:  # noqa: ANN401  any picklable value
    """Every rank's value, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
