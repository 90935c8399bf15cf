"""Memory of the workers, and load of the nodes that they run on."""

from __future__ import annotations

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from statistics import fmean

import psutil
import torch

from ul2r.train.callbacks import Callback
from ul2r.train.mesh import Mesh

GIB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SystemReport:
    """Numbers of one worker.

    Attributes:
        memory_bytes: On a GPU the most that torch has allocated, on a CPU the resident memory of the process.
        load: Values by metric, one of the node or one of each of its GPUs; empty unless this worker reports for the
            node.
    """

    memory_bytes: int
    load: dict[str, list[float]] = field(default_factory=dict)


class SystemMonitor(Callback):
    """Memory of the largest worker, and load of the nodes, for each of which its first worker reports.

    Loads are logged as minimum, mean and maximum over all nodes or GPUs, so that a run of any size has as many
    metrics. Their names begin with "system/", which MLflow shows on a page of its own. GPU load needs nvidia-ml-py.

    Args:
        mesh: Position of this rank; the constructor is collective over all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        node = socket.gethostname()
        self._reports_node = mesh.all_gather(node).index(node) == mesh.rank
        if self._reports_node:
            psutil.cpu_percent()  # the first call returns 0 and starts the measurement

    def rank_report(self) -> SystemReport:
        """Return this worker's memory, and its node's load if it reports for the node."""
        return SystemReport(worker_memory(), _node_load() if self._reports_node else {})

    def reduce_reports(self, reports: Sequence[SystemReport]) -> Mapping[str, float]:
        """Return "train/memory_gib", the memory of the largest worker, and "system/METRIC/min", "/mean" and "/max"."""
        loads = defaultdict[str, list[float]](list)
        for report in reports:
            for name, values in report.load.items():
                loads[name] += values

        metrics = {"train/memory_gib": max(report.memory_bytes for report in reports) / GIB}
        for name, values in loads.items():
            metrics[f"system/{name}/min"] = min(values)
            metrics[f"system/{name}/mean"] = fmean(values)
            metrics[f"system/{name}/max"] = max(values)
        return metrics


def _node_load() -> dict[str, list[float]]:
    load = {
        "cpu_utilization_percentage": [psutil.cpu_percent()],
        "memory_used_gib": [psutil.virtual_memory().used / GIB],
    }
    # NVML is asked rather than CUDA: a CUDA context on every device of the node would take memory there.
    if find_spec("pynvml") is None:
        return load
    for device in range(torch.cuda.device_count()):
        for name, value in _gpu_load(device).items():
            load.setdefault(name, []).append(value)
    return load


def _gpu_load(device: int) -> dict[str, float]:
    """Return the load of a GPU; what NVML cannot tell is left out, with a line the first time."""
    from pynvml import NVMLError, NVMLError_NotSupported  # torch.cuda's own source of these numbers

    readers: dict[str, Callable[[], float]] = {
        "gpu_memory_used_gib": lambda: torch.cuda.device_memory_used(device) / GIB,
        "gpu_utilization_percentage": lambda: float(torch.cuda.utilization(device)),
    }
    load = {}
    for name, read in readers.items():
        try:
            load[name] = read()
        except NVMLError_NotSupported:
            continue  # a MIG slice has no utilization
        # A lost device, or a driver that was replaced; torch turns some of these errors into its own. Monitoring ends
        # no run: a GPU that is really gone fails in training itself.
        except (NVMLError, RuntimeError, ImportError) as error:
            _warn_once(name, device, str(error) or type(error).__name__)
    return load


@cache
def _warn_once(name: str, device: int, reason: str) -> None:
    logger.warning(
        "%s: GPU %d has no %s, which its metrics leave out: %s",
        socket.gethostname(),
        device,
        name,
        reason,
    )


def worker_memory() -> int:
    """Return the bytes that this process uses: on a GPU the most that torch has allocated, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process(os.getpid()).memory_info().rss)
