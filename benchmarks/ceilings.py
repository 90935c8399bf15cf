"""Speeds that one device reaches at best: what the figures of the other benchmarks are to be divided by.

    python benchmarks/ceilings.py

Prints one JSON line:

    matmul_tflops         bf16 matrix product of 8,192 x 8,192 random matrices, 10^12 FLOPs per second; on an H100 or
                          H200 about 0.8 of the 989 that `benchmarks/mfu.py` divides by
    copy_tb_per_s         copy of 1 GiB within the device's memory, 10^12 bytes read and written per second
    to_device_gb_per_s    copy of 256 MiB from pinned host memory to the device, 10^9 bytes per second

On a CPU the sizes are small and the figures meaningless.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

NUM_WARMUP_RUNS = 3
NUM_RUNS = 10
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
MATRIX_SIZE = 8192 if ON_CUDA else 256
COPY_BYTES = 2**30 if ON_CUDA else 2**20
HOST_BYTES = COPY_BYTES // 4


def time_call(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call, the device's work included."""
    seconds = []
    for _ in range(NUM_WARMUP_RUNS + NUM_RUNS):
        start = time.perf_counter()
        call()
        if ON_CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[NUM_WARMUP_RUNS:])


def main() -> None:
    """Measure and print."""
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=DEVICE, dtype=torch.bfloat16)
    source, target = torch.empty(2, COPY_BYTES, device=DEVICE, dtype=torch.uint8)
    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=ON_CUDA)
    received = target[:HOST_BYTES]
    figures = {
        "matmul_tflops": 2 * MATRIX_SIZE**3 / time_call(lambda: left @ right) / 1e12,
        "copy_tb_per_s": 2 * COPY_BYTES / time_call(lambda: target.copy_(source)) / 1e12,
        "to_device_gb_per_s": HOST_BYTES / time_call(lambda: received.copy_(host)) / 1e9,
    }
    device = torch.cuda.get_device_name() if ON_CUDA else "cpu"
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    print(json.dumps({"benchmark": "ceilings", "device": device, **rounded}))


if __name__ == "__main__":
    main()
