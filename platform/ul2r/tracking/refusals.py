"""Failures of a tracking server or an artifact store: refusals, which would come again, and outages, which end."""

from __future__ import annotations

import errno
from http import HTTPStatus

from mlflow.exceptions import MlflowException

INVALID_VALUE = "INVALID_PARAMETER_VALUE"
"""MLflow's code of a refusal that names a value."""

OUTAGE_STATUSES = {
    # Credentials and gateways may be corrected while a run goes on.
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.TOO_MANY_REQUESTS,
}
"""Statuses from 400 to 499 that are not about what was sent."""

REFUSED_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}
"""Errors of a folder that this machine does not have or may not write."""


def is_refusal(error: Exception) -> bool:
    """Return whether the same request would fail again.

    An error of an unknown kind is an outage: what is kept can still be written.

    Args:
        error: One of MLflow's, of `requests`, of the operating system, or of an artifact store's package.
    """
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    # An error of `requests` has the server's response, or None if there was none.
    elif (response := getattr(error, "response", None)) is not None:
        status = getattr(response, "status_code", HTTPStatus.INTERNAL_SERVER_ERROR)
    elif isinstance(error, OSError) and error.errno is not None:
        return error.errno in REFUSED_PATHS
    else:
        # A store's package is missing, or its repository cannot do what is asked.
        return isinstance(error, ImportError | NotImplementedError)

    if status == HTTPStatus.NOT_IMPLEMENTED:
        return True
    return 400 <= status < 500 and status not in OUTAGE_STATUSES
