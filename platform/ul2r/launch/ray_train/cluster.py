"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ul2r.errors import LayoutError, ServiceError

ADDRESS_VARIABLE = "RAY_ADDRESS"
ANY_CLUSTER = "auto"
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
PROBE_TIMEOUT_S = 10.0
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES to tasks without GPUs; else Ray warns
}


@contextmanager
def connect_ray(cpus: float, gpus: float = 0, *, smaller: str = "ask for fewer") -> Iterator[None]:
    """Use a Ray cluster that can run what needs `cpus` and `gpus` at the same time.

    It is the one that RAY_ADDRESS names, as in a job that `ray job submit` started. Without it a local one is started,
    and stopped after the block; it promises `cpus` even where the machine has fewer cores, which they then share.

    Args:
        cpus: Logical CPUs.
        gpus: GPUs.
        smaller: What a user can do to need less, for the error's text.

    Raises:
        ServiceError: If RAY_ADDRESS names no cluster that answers.
        LayoutError: If the cluster is too small.
    """
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get(ADDRESS_VARIABLE)
    if address:
        _join(address)
    else:
        # Ray turns token authentication on, as it should, and warns of it.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            "local",
            num_cpus=max(cores(), math.ceil(cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    if threading.current_thread() is threading.main_thread():
        # Ray puts in a handler of its own, which aborts and leaves everything as it is.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        _require("CPU", cpus, smaller)
        _require("GPU", gpus, smaller)
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


def _join(address: str) -> None:
    """Connect to a running cluster, after a look whether it is there: Ray itself would try for minutes."""
    try:
        if address != ANY_CLUSTER:
            socket.create_connection(_host_and_port(address), PROBE_TIMEOUT_S).close()
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except OSError as error:
        raise ServiceError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address} ({error}): "
            f"start it, or unset {ADDRESS_VARIABLE} to run on this machine"
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) >= 2**16:
        raise ServiceError(
            f"{ADDRESS_VARIABLE}={address}: is not host:port of a Ray cluster's head; give that, "
            "or let the job run there by `ray job submit`"
        )
    return host.strip("[]"), int(port)


def _require(what: str, needed: float, smaller: str) -> None:
    there = ray.cluster_resources().get(what, 0)
    if there < needed:
        raise LayoutError(
            f"the cluster has {there:g} {what}s, this job needs {needed:g}: {smaller}, or use a larger cluster"
        )
