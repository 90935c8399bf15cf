"""An application up for as long as a `with` block lasts, in the Ray that is connected."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from serving.app import Arguments, build
from ul2r.errors import ServiceError

APPLICATION = "ul2r"
LOCALHOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
"""A start takes 10 s on two free cores; large weights take longer to read."""
POLL_S = 0.2


@contextmanager
def running(arguments: Arguments, port: int, host: str = LOCALHOST) -> Iterator[str]:
    """Serve a model while the block runs; yields the base URL, such as http://127.0.0.1:8000.

    Serve is started and shut down here: call `ray.init` first, on a Ray where no Serve runs yet.

    Raises:
        CheckpointError: If the model is no export.
        ServiceError: If the port is taken, the registry cannot be reached, or the model does not start.
    """
    check_port(port, host)
    application = build(arguments)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    url = f"http://{LOCALHOST if host == '0.0.0.0' else host}:{port}"
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
            wait_for_applications_running=False,
        )
        _wait_until_up(url, arguments)
        yield url
    finally:
        serve.shutdown()


def check_port(port: int, host: str = LOCALHOST) -> None:
    """Make sure that a port can be listened on.

    Raises:
        ServiceError: If it is taken, is no port number, or cannot be bound on that host.
    """
    if not 1 <= port <= 65535:
        raise ServiceError(f"port {port} is no port number: choose one of 1 to 65535 with --port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(f"port {port} is taken: choose another with --port") from error
            raise ServiceError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
            ) from error


def _wait_until_up(url: str, arguments: Arguments) -> None:
    """Wait until the model answers over HTTP.

    Raises:
        ServiceError: If its replica fails to start, or is not up in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_healthy(url):
        application = serve.status().applications[APPLICATION]
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            reasons = [of.message for of in application.deployments.values()] or [
                application.message
            ]
            raise ServiceError(f"the model does not start: {reasons[0].rstrip().splitlines()[-1]}")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{arguments.model} is not up after {START_TIMEOUT_S:.0f} s ({application.status.value}): "
                f"are cpus={arguments.cpus} and gpus={arguments.gpus} free in the cluster?"
            )
        time.sleep(POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False
