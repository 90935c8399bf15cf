"""Environment of workers under Ray Train."""

from __future__ import annotations

from ul2r.config import Parallel
from ul2r.launch.preflight import gpu_environment


def test_tensor_parallel_gpu_workers_have_one_connection_to_their_device() -> None:
    assert gpu_environment(Parallel(num_workers=2, tensor=2)) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1"
    }
    assert gpu_environment(Parallel(num_workers=2)) == {}
