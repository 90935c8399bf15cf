"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ul2r.errors import LayoutError, ServiceError

ADDRESS_VARIABLE = "RAY_ADDRESS"
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks without GPUs keep CUDA_VISIBLE_DEVICES; else Ray warns
}


@contextmanager
def connected(cpus: float, gpus: float = 0) -> Iterator[None]:
    """Use a Ray cluster that can run what needs `cpus` and `gpus` at the same time.

    It is the one that RAY_ADDRESS names, as it does in a job that `ray job submit` runs. Without it a local one is
    started, and stopped after the block; it promises `cpus` even where the machine has fewer cores, which then share.

    Raises:
        ServiceError: If RAY_ADDRESS names no cluster that answers.
        LayoutError: If the cluster is too small.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    address = os.environ.get(ADDRESS_VARIABLE)
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                "local",
                num_cpus=max(cores(), math.ceil(cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except ConnectionError as error:
        raise ServiceError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address}: start it, or unset {ADDRESS_VARIABLE} ({error})"
        ) from None
    try:
        _require(cpus, gpus)
        yield
    finally:
        ray.shutdown()


def cores() -> int:
    """CPU cores that this process may use, by its affinity and its control group's quota."""
    available = len(os.sched_getaffinity(0))
    if CPU_QUOTA_FILE.is_file():
        quota, period = CPU_QUOTA_FILE.read_text(encoding="ascii").split()
        if quota != "max":
            available = min(available, math.ceil(int(quota) / int(period)))
    return available


def _require(cpus: float, gpus: float) -> None:
    resources = ray.cluster_resources()
    for what, name, needed in (
        ("CPU", "parallel.workers", cpus),
        ("GPU", "launch.gpus_per_worker", gpus),
    ):
        there = resources.get(what, 0)
        if there < needed:
            raise LayoutError(
                f"the cluster has {there:g} {what}s, this job needs {needed:g}: "
                f"lower {name}, or use a larger cluster"
            )
