"""Serve a model for the duration of a `with` block, in the connected Ray cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from serving.app import ServingConfig, build
from serving.arguments import LOCALHOST, check_port
from ul2r.errors import ServiceError

APPLICATION = "ul2r"
START_TIMEOUT_S = 300.0
"""A start takes 10 s on two free cores; large weights take longer to load."""
POLL_S = 0.2
MESSAGE_INTERVAL_S = 15.0
"""Time between two lines about a model that is still loading."""

# The library's: a job shows its INFO records, and of other packages only warnings.
logger = logging.getLogger("ul2r.serving")


@contextmanager
def serve_model(config: ServingConfig, port: int, host: str = LOCALHOST) -> Iterator[str]:
    """Serve a model until the block ends; yield the base URL, such as http://127.0.0.1:8000.

    Serve is started and shut down here: call `ray.init` first, on a cluster where Serve is not running.

    Raises:
        CheckpointError: If the model is not an export.
        ServiceError: If the port is in use, the registry cannot be reached, or the model does not start.
    """
    # Before Serve starts, which takes seconds.
    check_port(port, host)
    application = build(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # 0.0.0.0 is an address to listen on, not one to connect to.
    url = f"http://{LOCALHOST if host == '0.0.0.0' else host}:{port}"

    try:
        serve.start(
            # One proxy, on this machine, whose port was checked; the default is one on every node.
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        # `serve.run` would wait forever for a cluster with too few free cores; `_wait_until_ready` has a timeout.
        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/")],
            wait_for_applications_running=False,
        )
        logger.info("%s: Serve is up, loading the model", config.model)
        _wait_until_ready(url, config)
        yield url
        _drain(config)
    except KeyboardInterrupt:
        # The usual end. A second one ends the waiting.
        _drain(config)
        raise
    finally:
        # After a failed start as well, which leaves Serve's controller and proxy running.
        serve.shutdown()


def _drain(config: ServingConfig) -> None:
    """Let requests in flight end before Serve is shut down, which would cut them."""
    applications = serve.status().applications
    if (
        APPLICATION not in applications
        or applications[APPLICATION].status != ApplicationStatus.RUNNING
    ):
        return
    # The way in is one process: this machine's.
    num_left = serve.get_app_handle(APPLICATION).drain.remote(config.drain_s).result()
    if num_left:
        logger.warning("%d requests did not end within %g s: cut off", num_left, config.drain_s)


def _wait_until_ready(url: str, config: ServingConfig) -> None:
    """Wait until the model responds over HTTP.

    Raises:
        ServiceError: If its replica fails to start, or is not ready in time.
    """
    start = time.monotonic()
    deadline = start + START_TIMEOUT_S
    last_message = start
    while not _is_healthy(url):
        # Looked at after each failed request: a failed deployment would never answer.
        application = serve.status().applications[APPLICATION]

        if application.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [deployment.message for deployment in application.deployments.values()]
            message = messages[0] if messages else application.message
            # The message is a traceback; its last line is the error itself.
            raise ServiceError(f"the model failed to start: {message.rstrip().splitlines()[-1]}")

        if time.monotonic() > deadline:
            raise ServiceError(
                f"{config.model} is not ready after {START_TIMEOUT_S:.0f} s ({application.status.value}): "
                f"check that the cluster has cpus={config.cpus} and gpus={config.gpus} free"
            )
        if time.monotonic() > last_message + MESSAGE_INTERVAL_S:
            last_message = time.monotonic()
            waited = f"{last_message - start:.0f} s"
            logger.info(
                "%s: still loading after %s (%s)", config.model, waited, application.status.value
            )
        time.sleep(POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        # trust_env=False: a proxy of the environment could not reach this machine's localhost.
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False
