"""Models in MLflow's registry: a version names an export folder, an alias says which one is served.

Weights are not copied. Through its server MLflow refuses `file://` sources (3.17), so a version's source is
`runs:/<run id>/export` and the folder's real place stands in the tag `export_uri`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ul2r.errors import CheckpointError, ServiceError
from ul2r.tracking.client import check_server, connect, translate_errors

DESCRIPTION_FILE = "ul2r.json"
"""What makes a Hugging Face folder an export of this platform."""


def hash_export(folder: Path) -> str:
    """SHA-256 over an export's weights and description, as hexadecimal digits.

    Raises:
        CheckpointError: If `folder` is not an export.
    """
    weights = sorted(folder.glob("*.safetensors"))
    description = folder / DESCRIPTION_FILE
    if not weights or not description.is_file():
        raise CheckpointError(
            f"{folder} is not an export (no *.safetensors with {DESCRIPTION_FILE}): run jobs/export.py RECIPE first"
        )
    whole = hashlib.sha256()
    for path in (*weights, description):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def register(uri: str, name: str, folder: Path, run_id: str, alias: str) -> str:
    """Make `folder` a version of model `name` and point `alias` at it; the same export twice is one version.

    Args:
        uri: The MLflow server.
        name: Registered model; made if there is none.
        folder: An export.
        run_id: Run that the export came from.
        alias: For example "champion".

    Returns:
        The version's number.

    Raises:
        CheckpointError: If `folder` is not an export.
        ServiceError: If the server fails.
    """
    client = connect(uri)
    tags = {"export_uri": folder.resolve().as_uri(), "digest": hash_export(folder)}
    with translate_errors(uri):
        _make_model(client, name)
        versions = client.search_model_versions(f"name='{name}'")
        same = [v for v in versions if v.run_id == run_id and tags.items() <= v.tags.items()]
        version = same[0] if same else _make_version(client, name, run_id, tags)
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def resolve(uri: str, name: str, alias: str) -> Path:
    """The export folder behind `models:/name@alias`.

    Raises:
        ServiceError: If the server is down, or has no such model or alias.
        CheckpointError: If the version's folder is not there.
    """
    uri = check_server(uri)
    try:
        version = connect(uri).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        reason = str(error).partition("\n")[0]
        raise ServiceError(
            f"models:/{name}@{alias} is not in the registry at {uri} ({reason}): export a run with "
            f"export.registered_model={name} export.alias={alias} first"
        ) from error
    place = version.tags.get("export_uri", "")
    folder = Path(unquote(urlsplit(place).path))
    if not place.startswith("file://") or not (folder / DESCRIPTION_FILE).is_file():
        raise CheckpointError(
            f"models:/{name}@{alias} (version {version.version}) lies at {place or 'an unknown place'}, where there is "
            "no export: put the folder back, or run jobs/export.py RECIPE again"
        )
    return folder


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _make_version(
    client: MlflowClient, name: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    """A new version; it is ready at once, since nothing is copied."""
    source = f"runs:/{run_id}/export"
    return client.create_model_version(name, source, run_id, tags=tags, await_creation_for=None)
