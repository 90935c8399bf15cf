"""Models in MLflow's registry: a version names an export folder, an alias selects the version to serve.

Weights are not copied. MLflow's server refuses `file://` sources (3.17), so a version's source is
`runs:/<run id>/export` and the folder's real location is in the tag `export_uri`.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ul2r.errors import CheckpointError, ServiceError
from ul2r.paths import EXPORT_METADATA_FILE
from ul2r.tracking.client import check_server, create_client, translate_errors
from ul2r.tracking.export_digest import hash_export


def register(uri: str, name: str, folder: Path, run_id: str, alias: str) -> str:
    """Register `folder` as a version of model `name` and point `alias` at it.

    Registering the same export again moves the alias to the version that it has already.

    Args:
        uri: The MLflow server.
        name: Registered model; created if it does not exist.
        folder: An export.
        run_id: Run that the export came from.
        alias: For example "champion".

    Returns:
        The version's number.

    Raises:
        CheckpointError: If `folder` is not an export.
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    tags = {"export_uri": folder.resolve().as_uri(), "digest": hash_export(folder)}

    with translate_errors(uri):
        _ensure_model(client, name)
        versions = client.search_model_versions(f"name='{name}'")
        # Of the same run too: MLflow links a version to one run.
        same = [v for v in versions if v.run_id == run_id and tags.items() <= v.tags.items()]
        version = same[0] if same else _create_version(client, name, run_id, tags)
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def resolve(uri: str, name: str, alias: str) -> Path:
    """Return the export folder behind `models:/name@alias`.

    Raises:
        ServiceError: If the server is down, or has no such model or alias.
        CheckpointError: If the version's folder does not exist.
    """
    uri = check_server(uri)
    try:
        version = create_client(uri).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        reason = str(error).partition("\n")[0]
        raise ServiceError(
            f"models:/{name}@{alias} is not in the registry at {uri} ({reason}): export a run with "
            f"export.registered_model={name} export.alias={alias} first"
        ) from error

    location = version.tags.get("export_uri", "")
    # as_uri() escapes spaces and other characters.
    folder = Path(unquote(urlsplit(location).path))
    if not location.startswith("file://") or not (folder / EXPORT_METADATA_FILE).is_file():
        raise CheckpointError(
            f"models:/{name}@{alias} (version {version.version}): no export at {location or 'an unknown location'}: "
            "move the folder back, or run jobs/export.py RECIPE again"
        )
    return folder


def _ensure_model(client: MlflowClient, name: str) -> None:
    # Asking first whether the model exists would leave a gap in which another run can create it.
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(
    client: MlflowClient, name: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    source = f"runs:/{run_id}/export"
    # By default MLflow polls for up to five minutes until the version is ready; without a copy it is ready at once.
    return client.create_model_version(name, source, run_id, tags=tags, await_creation_for=None)
