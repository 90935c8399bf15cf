"""Artifact stores: the server's own, or one that its clients write to and may not be able to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ul2r.errors import ServiceError
from ul2r.tracking.client import create_client, first_line, translate_errors

PROBE_FILE = "ul2r-probe.txt"
"""Always the same name: where files cannot be removed, only one is left."""


def check_artifact_store(uri: str, experiment: str) -> None:
    """Check that this machine can write artifacts of an experiment, by writing a small one and removing it.

    A server that does not serve artifacts leaves them to its clients: at a path, or in a store such as s3:// whose
    package and credentials each client needs. The experiment is created if it does not exist.

    Raises:
        ServiceError: If the server fails, the experiment is deleted, or the artifact cannot be written.
    """
    location = open_experiment(uri, experiment).artifact_location
    with translate_store_errors(uri, f"experiment {experiment!r} to {location}"):
        write_probe(uri, location)


def write_probe(uri: str, location: str) -> None:
    """Write a small artifact to a store, and remove it.

    Args:
        uri: The tracking server, which serves some of the stores.
        location: The store.

    Raises:
        Exception: Of any kind, if it cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PROBE_FILE
        file.write_text("written by a check, may be removed\n", encoding="utf-8")
        repository = get_artifact_repository(location, tracking_uri=uri)
        repository.log_artifact(str(file))
        # Some stores cannot remove anything, and some credentials may not.
        with suppress(Exception):
            repository.delete_artifacts(PROBE_FILE)


def open_experiment(uri: str, name: str) -> Experiment:
    """Return an experiment, which is created if it does not exist.

    Raises:
        ServiceError: If the server fails, or the experiment is deleted.
    """
    client = create_client(uri)
    with translate_errors(uri):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            experiment = _create_experiment(client, name)
    if experiment.lifecycle_stage != "active":
        raise ServiceError(
            f"tracking.experiment={name}: is deleted in MLflow at {uri}: restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or set another name"
        )
    return experiment


def _create_experiment(client: MlflowClient, name: str) -> Experiment:
    try:
        return client.get_experiment(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        # Another run has created it in the meantime.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment


@contextmanager
def translate_store_errors(uri: str, owner: str) -> Iterator[None]:
    """Turn a failure of an artifact store inside the block into a one-line error.

    Args:
        uri: The tracking server.
        owner: Run or experiment that the artifacts belong to.

    Raises:
        ServiceError: If the block fails.
    """
    try:
        yield
    # Each kind of store raises errors of its own package, down to that of a package that is not installed.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ServiceError(
            f"artifacts of {owner} cannot be written ({reason}): start MLflow at {uri} with --serve-artifacts and a "
            "store that it can write, or give this machine the path, package and credentials of the store"
        ) from error
