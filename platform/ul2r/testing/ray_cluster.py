"""A Ray cluster of its own processes, as an operator starts one, and waiting for what happens in it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ul2r.tracking.server import find_free_port

WAIT_S = 240.0
BIN = Path(sys.executable).parent
ACTIVATED: Mapping[str, str] = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
"""Environment in which the commands of this Python's packages are found."""


@dataclass(frozen=True)
class RayCluster:
    """A running cluster.

    Attributes:
        head: Process of its head.
        gcs: Address of its control store.
        jobs: Address of its job server.
    """

    head: int
    gcs: str
    jobs: str


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:  # noqa: ANN401  the condition's own value
    """Poll a condition until it is true and return its value; fail on a timeout or if `process` ends first."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.05)
    raise AssertionError(f"the condition was not met within {WAIT_S} s")


@contextlib.contextmanager
def run_ray_cluster(log: Path) -> Iterator[RayCluster]:
    """Start a cluster with `ray start --head`, and kill its processes at the end of the block.

    Args:
        log: File for the output.
    """
    port, dashboard, agent = find_free_port(), find_free_port(), find_free_port()
    command = [
        *(f"{BIN}/ray", "start", "--head", "--block", "--num-cpus=4"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
        f"--dashboard-agent-listen-port={agent}",  # its default is one port for the whole machine
        *("--object-store-memory=300000000", "--disable-usage-stats"),
    ]
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, stdout=output, stderr=output, env=ACTIVATED, start_new_session=True
        )
    try:
        wait_for(lambda: _is_listening(dashboard), head)
        yield RayCluster(head.pid, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        # Asked to stop, `ray start --block` waits half a minute for processes that are gone.
        for process in (*psutil.Process(head.pid).children(recursive=True), head):
            with contextlib.suppress(psutil.NoSuchProcess):  # some end when their parents do
                process.kill()
        head.wait()


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
