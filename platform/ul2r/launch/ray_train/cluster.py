"""Ray cluster of a job: the one that it was submitted to, or a local one of its own."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ul2r.environment import RAY_ADDRESS, count_cores
from ul2r.errors import LayoutError, ServiceError
from ul2r.launch.ray_train.local_ray import python_environment, start_local_ray

ANY_CLUSTER = "auto"
PROBE_TIMEOUT_S = 10.0
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Setting of Ray Train 2.60: an actor of each run that watches for machines that are to be taken away."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray leaves CUDA_VISIBLE_DEVICES as it is in tasks without GPUs; its default clears it and warns of the change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of Ray, where the user has not set it."""


@contextmanager
def connect_ray(cpus: float, gpus: float = 0, *, smaller: str = "ask for fewer") -> Iterator[None]:
    """Connect to a Ray cluster with at least `cpus` and `gpus` while the block runs.

    It is the cluster that RAY_ADDRESS names, as in a job that `ray job submit` started. Without that variable a local
    one is started and stopped. The local one offers `cpus` even on a machine with fewer cores, which tasks then share.

    Args:
        cpus: Logical CPUs.
        gpus: GPUs.
        smaller: Advice for the error message: how to need less.

    Raises:
        ServiceError: If RAY_ADDRESS names no cluster that answers, or a local one cannot start.
        LayoutError: If the cluster is too small.
    """
    # In a task of a cluster: it is connected already, and stays so.
    if ray.is_initialized():
        _require("CPU", cpus, smaller)
        _require("GPU", gpus, smaller)
        yield
        return
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)

    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get(RAY_ADDRESS)
    before = os.environ.get(WATCHER)
    if address:
        _join(address)
    else:
        # Nobody takes the machine away: an actor less to start. Before the node starts, which inherits it.
        os.environ.setdefault(WATCHER, "0")
        start_local_ray(max(count_cores(), math.ceil(cpus)))
    if threading.current_thread() is threading.main_thread():
        # `ray.init` installs a SIGTERM handler that aborts without any cleanup.
        signal.signal(signal.SIGTERM, on_sigterm)

    try:
        _require("CPU", cpus, smaller)
        _require("GPU", gpus, smaller)
        yield
    finally:
        ray.shutdown()
        if before is None:
            os.environ.pop(WATCHER, None)


def _join(address: str) -> None:
    """Connect to a running cluster.

    Raises:
        ServiceError: If none answers.
    """
    # Tried with a plain socket first: `ray.init` itself tries for minutes.
    try:
        if address != ANY_CLUSTER:
            socket.create_connection(_host_and_port(address), PROBE_TIMEOUT_S).close()
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            # A cluster's machines have the package at the same path, see clusters/README.md.
            runtime_env=python_environment(),
        )
    # ray.init raises ConnectionError, which is an OSError, too.
    except OSError as error:
        raise ServiceError(
            f"no Ray cluster answers at {RAY_ADDRESS}={address} ({error}): "
            f"start it, or unset {RAY_ADDRESS} to run on this machine"
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    """Parse host:port.

    Raises:
        ServiceError: If the address is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) >= 2**16:
        raise ServiceError(
            f"{RAY_ADDRESS}={address}: is not host:port of a Ray cluster's head; set that, "
            "or submit the job with `ray job submit`"
        )
    # An IPv6 address is in brackets before its port.
    return host.strip("[]"), int(port)


def _require(resource: str, needed: float, smaller: str) -> None:
    """Check that the cluster has enough of a resource.

    Raises:
        LayoutError: If it has not.
    """
    available = ray.cluster_resources().get(resource, 0)
    if available < needed:
        raise LayoutError(
            f"the cluster has {available:g} {resource}s, this job needs {needed:g}: {smaller}, or use a larger cluster"
        )
