"""Load of nodes and GPUs: the same metrics for any number of nodes, and no error of a driver."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ul2r.train.monitor.system import SystemMonitor, SystemReport, _gpu_load


def test_number_of_metrics_does_not_depend_on_the_number_of_nodes() -> None:
    # Without a mesh, which takes a process group.
    monitor = object.__new__(SystemMonitor)
    nodes = [SystemReport(2**30 * n, {"gpu_memory_used_gib": [n, n + 1.0]}) for n in range(1, 126)]
    workers = [SystemReport(5)] * 875
    assert monitor.reduce_reports([*nodes, *workers]) == {
        "train/memory_gib": 125,
        "system/gpu_memory_used_gib/min": 1,
        "system/gpu_memory_used_gib/mean": 63.5,
        "system/gpu_memory_used_gib/max": 126,
    }


@pytest.mark.parametrize("of_torch", [False, True])
def test_error_of_the_gpu_driver_leaves_a_value_out_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of_torch: bool
) -> None:
    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818  pynvml's name
        pass

    def fail(_: int) -> int:
        raise RuntimeError("cuda driver can't be loaded") if of_torch else NVMLError("GPU is lost")

    pynvml = types.ModuleType("pynvml")
    monkeypatch.setattr(pynvml, "NVMLError", NVMLError, raising=False)
    monkeypatch.setattr(pynvml, "NVMLError_NotSupported", NVMLError_NotSupported, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda _: 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", fail)
    for _ in range(2):
        assert _gpu_load(0) == {"gpu_memory_used_gib": 1}
    (line,) = caplog.messages
    assert "GPU 0 has no gpu_utilization_percentage, which its metrics leave out: " in line
