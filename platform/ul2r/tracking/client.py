"""Access to an MLflow server: its address, a health check, and one-line errors for its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import urlsplit

from requests.utils import should_bypass_proxies

from ul2r.errors import ServiceError
from ul2r.tracking.proxies import (
    bypass_proxies_for_this_machine,
    find_missing_certificates,
    find_proxy,
)

# MLflow reads some of these when it is imported, so they are set first. Values from the user's environment win.
# Its defaults, 7 retries of up to 120 s with growing pauses, keep a job waiting for minutes if the server is down.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A project of uv's in the working directory is none of an export's.
    "MLFLOW_UV_AUTO_DETECT": "false",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402  the environment above must be set before
from mlflow.environment_variables import (  # noqa: E402  after the environment
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)
from mlflow.exceptions import MlflowException  # noqa: E402  after the environment
from mlflow.utils.credentials import get_default_host_creds  # noqa: E402  after the environment
from mlflow.utils.rest_utils import http_request  # noqa: E402  after the environment

HEALTH_TIMEOUT_S = 5.0
START_HINT = "start one with `ul2r ui --storage FOLDER`"


def check_server(uri: str | None, key: str = "tracking.uri") -> str:
    """Check that a tracking server answers.

    Args:
        uri: Address, http(s)://host:port; None takes MLFLOW_TRACKING_URI from the environment.
        key: Setting that `uri` comes from, for the error message.

    Returns:
        The address, without a trailing slash.

    Raises:
        ServiceError: If there is no address, or no MLflow server answers there.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not found:
        raise ServiceError(
            f"no MLflow server: {key} and MLFLOW_TRACKING_URI are empty; "
            f"{START_HINT} and set either to its address"
        )
    name = key if uri else "MLFLOW_TRACKING_URI"
    if not found.startswith(("http://", "https://")):
        raise ServiceError(
            f"{name}={found}: the address of an MLflow server begins with http:// or https://; {START_HINT}"
        )

    # Paths of requests and of pages begin with a slash.
    found = found.rstrip("/")
    problem = find_server_problem(found, HEALTH_TIMEOUT_S)
    if problem is not None:
        raise ServiceError(
            f"no MLflow server answers at {found} ({problem}): {START_HINT}, or set {name} to a running one"
        )
    return found


def find_server_problem(uri: str, timeout_s: float) -> str | None:
    """Return why the server at `uri` cannot be used, None if it can."""
    # Read by every later request: a value that is no number is refused here, not in the middle of a run.
    for variable in (MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT):
        if not os.environ.get(variable.name, "0").strip().isdecimal():
            return f"{variable.name}={os.environ[variable.name]} is not a whole number: correct or unset it"

    try:
        bypass_proxies_for_this_machine(uri)
        # As MLflow's own requests, with the same proxy, certificates and credentials, but without retries.
        response = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=timeout_s,
            raise_on_status=False,
        )
    except MlflowException as error:
        return _explain(uri, error)
    # An address that cannot be parsed, or a variable of MLflow's, which the message names, that is not true or false.
    except ValueError as error:
        return first_line(error)
    return None if response.status_code == HTTPStatus.OK else f"HTTP {response.status_code}"


def _explain(uri: str, error: Exception) -> str:
    """Return in one line why a request failed, with the variables of the environment that it depends on."""
    # http_request raises while it handles the error of `requests`.
    reason = _root_cause(error.__context__ or error)
    certificates = find_missing_certificates() if uri.startswith("https://") else None
    if certificates is not None:
        return f"{certificates} does not exist: correct or unset it"

    proxy = find_proxy(uri)
    if proxy is None or should_bypass_proxies(uri, no_proxy=None):
        return reason

    host = urlsplit(uri).hostname
    if "SOCKS" in reason:
        return f"{reason} {proxy}: install PySocks, or add {host} to no_proxy"
    return f"{reason}, through the proxy of {proxy}: correct it, or add {host} to no_proxy"


def _root_cause(error: BaseException) -> str:
    """Return the innermost reason of an error of `requests`, which wraps those of urllib3 and of sockets."""
    while True:
        inner = next(
            (
                e
                for e in (getattr(error, "reason", None), error.__cause__, *error.args)
                if isinstance(e, Exception)
            ),
            None,
        )
        if inner is None:
            return " ".join(str(error).split()) or type(error).__name__
        error = inner


def create_client(uri: str) -> MlflowClient:
    """Create a client of the tracking server and registry at `uri`."""
    bypass_proxies_for_this_machine(uri)
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
        raise ServiceError(f"MLflow at {uri} failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    # The lines after it hold the server's whole response, or a stack trace of urllib3.
    return str(error).strip().partition("\n")[0] or type(error).__name__
