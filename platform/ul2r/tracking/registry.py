"""Models in MLflow's registry: a version names an export folder, an alias selects the version to serve.

Weights are not copied. MLflow's server refuses `file://` sources (3.17), so a version's source is the run's logged
model (`ul2r.tracking.logged_model`), and the folder's real location is in the tag `export_uri`. Versions that were
registered before there were logged models have the source `runs:/<run id>/export`, which MLflow itself cannot load.
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
from ul2r.tracking.logged_model import ModelDetails, log_model
from ul2r.tracking.model_uri import ModelUri


def log_export(uri: str, folder: Path, run_id: str, details: ModelDetails) -> str:
    """Log an export as a model of its run, once; return the model's id.

    Raises:
        CheckpointError: If `folder` is not an export.
        ServiceError: If the server fails.
    """
    return log_model(uri, run_id, hash_export(folder), details)


def register(
    uri: str, name: str, folder: Path, run_id: str, *, alias: str, details: ModelDetails
) -> str:
    """Log `folder` as a model of its run, register that as a version of model `name`, and point `alias` at it.

    Registering the same export again moves the alias to the version that it has already.

    Args:
        uri: The MLflow server.
        name: Registered model; created if it does not exist.
        folder: An export.
        run_id: Run that the export came from.
        alias: For example "champion".
        details: Description of the export, which replaces that of an earlier call.

    Returns:
        The version's number.

    Raises:
        CheckpointError: If `folder` is not an export.
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    tags = {"export_uri": folder.resolve().as_uri(), "digest": hash_export(folder)}
    model_id = log_model(uri, run_id, tags["digest"], details)
    source = f"models:/{model_id}"

    with translate_errors(uri):
        _ensure_model(client, name)
        versions = client.search_model_versions(f"name='{name}'")
        same = [v for v in versions if v.source == source and tags.items() <= v.tags.items()]
        # By default MLflow polls for up to five minutes until the version is ready; without a copy it is so at once.
        version = (
            same[0]
            if same
            else client.create_model_version(
                name, source, run_id, tags=tags, await_creation_for=None, model_id=model_id
            )
        )
        _describe_version(client, version, details)
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def resolve(uri: str, model: ModelUri) -> Path:
    """Return the export folder of a version of a registered model.

    Raises:
        ServiceError: If the server is down, or has no such model, alias or version.
        CheckpointError: If the version's folder does not exist.
    """
    uri = check_server(uri)
    try:
        version = _find_version(create_client(uri), model)
    except MlflowException as error:
        reason = str(error).partition("\n")[0]
        raise ServiceError(
            f"{model} is not in the registry at {uri} ({reason}): export a run with "
            f"export.registered_model={model.name} first, or name another alias or version"
        ) from error

    location = version.tags.get("export_uri", "")
    # as_uri() escapes spaces and other characters.
    folder = Path(unquote(urlsplit(location).path))
    if not location.startswith("file://") or not (folder / EXPORT_METADATA_FILE).is_file():
        raise CheckpointError(
            f"{model} (version {version.version}): no export at {location or 'an unknown location'}: "
            "move the folder back, or run `ul2r export RECIPE` again"
        )
    return folder


def _ensure_model(client: MlflowClient, name: str) -> None:
    # Asking first whether the model exists would leave a gap in which another run can create it.
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: MlflowClient, model: ModelUri) -> ModelVersion:
    """Return a version of a registered model.

    Raises:
        MlflowException: If there is none, or the server fails.
    """
    if model.alias is not None:
        return client.get_model_version_by_alias(model.name, model.alias)
    if model.version is not None:
        return client.get_model_version(model.name, str(model.version))
    client.get_registered_model(model.name)
    newest = client.search_model_versions(
        f"name='{model.name}'", max_results=1, order_by=["version_number DESC"]
    )
    if not newest:
        raise MlflowException("it has no version")
    return newest[0]


def _describe_version(client: MlflowClient, version: ModelVersion, details: ModelDetails) -> None:
    """Set a version's tags and description, with the commands that serve and load it."""
    model = f"models:/{version.name}/{version.version}"
    serve = f"ul2r serve {model}"
    for key, value in {**details.tags, "serve": serve}.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    commands = "\n".join(
        [
            "```",
            serve,
            f"mlflow models serve -m {model} --env-manager local",
            f'mlflow.pyfunc.load_model("{model}")',
            "```",
        ]
    )
    client.update_model_version(version.name, version.version, details.describe(commands))
