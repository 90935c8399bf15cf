"""The way to an MLflow server: found, checked, and its failures told in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from ul2r.errors import ServiceError

# Read by MLflow when it is imported or called; whoever sets them in the environment wins.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402  after its environment
from mlflow.exceptions import MlflowException  # noqa: E402

HEALTH_TIMEOUT_S = 5.0
START_HINT = "start one with `python jobs/ui.py --storage FOLDER`"


def check_server(uri: str | None) -> str:
    """Make sure that the tracking server answers.

    Args:
        uri: Its address, http(s)://host:port; None takes MLFLOW_TRACKING_URI from the environment.

    Returns:
        The address, without a slash at its end.

    Raises:
        ServiceError: If there is no address, or nothing answers there as MLflow does.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not found:
        raise ServiceError(
            "no MLflow server: tracking.uri and MLFLOW_TRACKING_URI are empty; "
            f"{START_HINT} and set either to its address"
        )
    if not found.startswith(("http://", "https://")):
        raise ServiceError(
            f"tracking.uri={found}: the address of an MLflow server begins with http:// or https://; {START_HINT}"
        )
    found = found.rstrip("/")
    reason = health(found, HEALTH_TIMEOUT_S)
    if reason:
        raise ServiceError(
            f"no MLflow server answers at {found} ({reason}): {START_HINT}, or set tracking.uri to where it is"
        )
    return found


def health(uri: str, timeout_s: float) -> str:
    """Why the server at `uri` cannot be used; empty where it can."""
    try:
        answer = httpx.get(f"{uri}/health", timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return "" if answer.status_code == httpx.codes.OK else f"HTTP {answer.status_code}"


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at `uri`."""
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Turn a failure of the server inside the block into a one-line error.

    Raises:
        ServiceError: If MLflow refused a request, or could not be reached.
    """
    try:
        yield
    except MlflowException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ServiceError(f"MLflow at {uri} failed: {reason}") from error
