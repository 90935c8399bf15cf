"""An MLflow server of one storage folder: runs in SQLite, artifacts in a folder, models in the registry."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ul2r.errors import ServiceError
from ul2r.tracking.client import health

HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
"""A start takes 8 s on two free cores, ten times that on busy ones."""
STOP_TIMEOUT_S = 10.0
LOG = "mlflow.log"
QUIET_PORTS = range(20_000, 32_000)
"""Between those of Ray's workers and those that Linux gives to whoever asks for any."""


@contextmanager
def run_mlflow_server(storage: Path, port: int | None = None) -> Iterator[str]:
    """An MLflow server that is up while the block runs.

    It listens on this machine alone, keeps runs in `storage`/mlflow.db and artifacts in `storage`/artifacts, and
    writes its own log to `storage`/mlflow.log. Two servers may share a storage: SQLite takes one writer at a
    time, and the other waits.

    Args:
        storage: Made if it does not exist.
        port: None takes a free one.

    Yields:
        The server's address.

    Raises:
        ServiceError: If the port is taken, or the server does not start.
    """
    if port is not None and _is_taken(port):
        raise ServiceError(f"port {port} is taken: choose another with --port")
    port = port or find_free_port()
    storage = storage.resolve()
    storage.mkdir(parents=True, exist_ok=True)
    uri = f"http://{HOST}:{port}"
    with (storage / LOG).open("ab") as log:
        server = _start(storage, port, log.fileno())
    try:
        _wait_until_up(server, uri, storage / LOG)
        yield uri
    finally:
        _stop(server)


def _start(storage: Path, port: int, log: int) -> subprocess.Popen[bytes]:
    """The server in a session of its own, so that all of its processes can be ended together."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{storage / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(storage / "artifacts"), "--serve-artifacts"]
    switches = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen(
        command,
        env={**os.environ, **switches},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _wait_until_up(server: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while health(uri, timeout_s=2.0):
        if server.poll() is not None:
            raise ServiceError(f"the MLflow server ended with code {server.returncode}: see {log}")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"no MLflow server at {uri} after {START_TIMEOUT_S:.0f} s: see {log}"
            )
        time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End every process of the server's session, at first gently."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def find_free_port() -> int:
    """A port of this machine that no other program is given unasked before its owner listens on it."""
    while True:
        port = random.choice(QUIET_PORTS)
        if not _is_taken(port):
            return port
