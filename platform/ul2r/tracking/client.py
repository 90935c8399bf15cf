"""Access to an MLflow server: its address, a health check, and one-line errors for its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from ul2r.errors import ServiceError

# MLflow reads some of these when it is imported, so they are set first. Values from the user's environment win.
# Its defaults, 7 retries of up to 120 s with growing pauses, keep a job waiting for minutes if the server is down.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402  the environment above must be set before
from mlflow.exceptions import MlflowException  # noqa: E402

HEALTH_TIMEOUT_S = 5.0
START_HINT = "start one with `python jobs/ui.py --storage FOLDER`"


def check_server(uri: str | None) -> str:
    """Check that a tracking server answers.

    Args:
        uri: Address, http(s)://host:port; None takes MLFLOW_TRACKING_URI from the environment.

    Returns:
        The address, without a trailing slash.

    Raises:
        ServiceError: If there is no address, or no MLflow server answers there.
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

    # Paths of requests and of pages begin with a slash.
    found = found.rstrip("/")
    problem = find_server_problem(found, HEALTH_TIMEOUT_S)
    if problem is not None:
        raise ServiceError(
            f"no MLflow server answers at {found} ({problem}): {START_HINT}, or set tracking.uri to a running one"
        )
    return found


def find_server_problem(uri: str, timeout_s: float) -> str | None:
    """Return why the server at `uri` cannot be used, None if it can."""
    try:
        # By httpx and not MLflow's client, which would retry.
        response = httpx.get(f"{uri}/health", timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return None if response.status_code == httpx.codes.OK else f"HTTP {response.status_code}"


def create_client(uri: str) -> MlflowClient:
    """Create a client of the tracking server and registry at `uri`."""
    # Without its own address the registry is the one of MLFLOW_REGISTRY_URI, which may be another server.
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
        # The lines after the first hold the server's whole response, or a stack trace of urllib3.
        reason = str(error).strip().partition("\n")[0]
        raise ServiceError(f"MLflow at {uri} failed: {reason}") from error
