"""Checks of the arguments that a model is served with; imports neither torch nor Ray."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from ul2r.errors import ServiceError
from ul2r.tracking.model_uri import ModelUri, is_model_uri

LOCALHOST = "127.0.0.1"


def check_port(port: int, host: str = LOCALHOST) -> None:
    """Check that a server can listen on a port.

    Raises:
        ServiceError: If the port is in use, is not a port number, or cannot be bound on that host.
    """
    if not 1 <= port <= 65535:
        raise ServiceError(
            f"port {port} is not a port number: choose one from 1 to 65535 with --port"
        )

    with socket.socket() as probe:
        # Without it a port whose last connections are in TIME_WAIT would count as in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(
                    f"port {port} is in use: choose another with --port (of make: PORT=)"
                ) from error
            raise ServiceError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
            ) from error


def resolve_model(model: str, tracking_uri: str | None = None, key: str = "tracking_uri") -> Path:
    """Return the absolute export folder of `model`, which is a path or a URI in a model registry.

    An alias and the newest version are those of now: what is served stays the same when they move.

    Args:
        model: The model.
        tracking_uri: MLflow server of the registry.
        key: Setting that `tracking_uri` comes from, for error messages.

    Raises:
        CheckpointError: If a registry URI has another form than `ModelUri`, or its folder is gone.
        ServiceError: If the registry cannot be reached or has no such model or version.
    """
    if not is_model_uri(model):
        # Absolute, since replicas have another working directory. `Path.resolve` raises a RuntimeError for a link to
        # itself before Python 3.13.
        return Path(os.path.realpath(model))

    uri = ModelUri.parse(model)
    # Importing MLflow takes seconds; serving from a folder does not need it.
    from ul2r.tracking.mlflow import check_server, resolve

    return resolve(check_server(tracking_uri, key), uri)
