"""An MLflow server on one storage folder: runs in SQLite, artifacts in a folder, models in the registry."""

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
from ul2r.paths import StoragePaths
from ul2r.tracking.client import find_server_problem

HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
"""A start takes 8 s on two idle cores, ten times that on busy ones."""
STOP_TIMEOUT_S = 10.0
PORT_RANGE = range(20_000, 32_000)
"""Above the ports of Ray's workers, below the ephemeral ports that Linux hands out to any program."""


@contextmanager
def run_mlflow_server(storage: Path, port: int | None = None) -> Iterator[str]:
    """Run an MLflow server during the block.

    It listens on this machine only, and keeps its files where `StoragePaths` says: runs in a database, artifacts in a
    folder, its output in a log. Two servers may share a storage: SQLite takes one writer at a time, the other waits.

    Args:
        storage: Created if it does not exist.
        port: None takes a free one.

    Yields:
        The server's address.

    Raises:
        ServiceError: If the port is in use, or the server does not start.
    """
    if port is not None and _is_taken(port):
        raise ServiceError(f"port {port} is in use: choose another with --port (of make: PORT=)")

    port = port or find_free_port()
    storage = storage.resolve()
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServiceError(
            f"{storage}: MLflow's files cannot be kept there ({error.strerror}): name a folder that can be written to"
        ) from None
    paths = StoragePaths(storage)
    uri = f"http://{HOST}:{port}"
    with paths.mlflow_log.open("ab") as log:
        # The server has its own descriptor of the log, so that this one can be closed.
        server = _start(paths, port, log.fileno())

    try:
        _wait_until_up(server, uri, paths.mlflow_log)
        yield uri
    finally:
        _stop(server)


def _start(paths: StoragePaths, port: int, log: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    # Each worker is a process that takes seconds to import MLflow, and SQLite has one writer anyway.
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{paths.mlflow_database}"]
    # Clients upload artifacts through the server and need no access to its disk.
    command += ["--artifacts-destination", str(paths.mlflow_artifacts), "--serve-artifacts"]
    # Job execution, on by default, would add processes for features that are not used here.
    switches = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # The log carries any text, whatever this process's own encoding is.
    switches["PYTHONIOENCODING"] = "utf-8"
    # Neither the server nor its workers, which look into their working directory, import a module of the user's.
    switches["PYTHONSAFEPATH"] = "1"

    return subprocess.Popen(
        command,
        env={**os.environ, **switches},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        # The server forks workers. In a session of its own they can be ended together.
        start_new_session=True,
        cwd=paths.storage,
    )


def _wait_until_up(server: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while find_server_problem(uri, timeout_s=2.0) is not None:
        if server.poll() is not None:
            raise ServiceError(f"the MLflow server ended with code {server.returncode}: see {log}")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"no MLflow server at {uri} after {START_TIMEOUT_S:.0f} s: see {log}"
            )
        time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End every process of the server's session: SIGTERM first, then SIGKILL."""
    # SIGKILL is sent after a clean exit too: workers may outlive the leader, and without any the call fails.
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
        # Without it a port counts as taken for a minute after its server stopped (TIME_WAIT).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def find_free_port() -> int:
    """Return a free port of `PORT_RANGE`.

    A port that the system chooses may be handed to another program before the caller listens on it.
    """
    while True:
        port = random.choice(PORT_RANGE)
        if not _is_taken(port):
            return port
