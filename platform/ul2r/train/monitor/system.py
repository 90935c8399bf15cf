"""Memory of the workers, and load of the nodes that they run on."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec

import psutil
import torch

from ul2r.train.callbacks import Callback
from ul2r.train.mesh import Mesh

GIB = 2**30


@dataclass(frozen=True)
class SystemReport:
    """Numbers of one worker.

    Attributes:
        memory_bytes: On a GPU the most that torch has allocated, on a CPU the resident memory of the process.
        node: Metrics of its node, empty unless this worker reports for the node.
    """

    memory_bytes: int
    node: dict[str, float] = field(default_factory=dict)


class SystemMonitor(Callback):
    """Memory of the largest worker, and load of each node, for which its first worker reports.

    Names of a node's metrics begin with "system/", which MLflow shows on a page of its own. GPU load needs
    nvidia-ml-py.

    Args:
        mesh: Position of this rank; the constructor is collective over all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._node = socket.gethostname()
        nodes = mesh.all_gather(self._node)
        self._reports_node = nodes.index(self._node) == mesh.rank
        if self._reports_node:
            psutil.cpu_percent()  # the first call returns 0 and starts the measurement

    def rank_report(self) -> SystemReport:
        """Return this worker's memory, and its node's load if it reports for the node."""
        return SystemReport(_worker_memory(), self._node_load() if self._reports_node else {})

    def reduce_reports(self, reports: Sequence[SystemReport]) -> Mapping[str, float]:
        """Return "train/memory_gib", the memory of the largest worker, and the load of every node."""
        largest = max(report.memory_bytes for report in reports)
        metrics = {"train/memory_gib": largest / GIB}
        for report in reports:
            metrics |= report.node
        return metrics

    def _node_load(self) -> dict[str, float]:
        load = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "memory_used_gib": psutil.virtual_memory().used / GIB,
        }
        # NVML is asked rather than CUDA: a CUDA context on every device of the node would take memory there.
        if find_spec("pynvml") is not None:
            for device in range(torch.cuda.device_count()):
                load |= _gpu_load(device)
        return {f"system/{self._node}/{name}": value for name, value in load.items()}


def _gpu_load(device: int) -> dict[str, float]:
    from pynvml import NVMLError_NotSupported  # torch.cuda's own source of these numbers

    load = {f"gpu_{device}_memory_used_gib": torch.cuda.device_memory_used(device) / GIB}
    with suppress(NVMLError_NotSupported):  # a MIG slice reports no utilization
        load[f"gpu_{device}_utilization_percentage"] = torch.cuda.utilization(device)
    return load


def _worker_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process(os.getpid()).memory_info().rss)
