"""An export in MLflow: a logged model of its run, and a version of a registered model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ul2r.config import Recipe
from ul2r.config.tracking import FILES
from ul2r.errors import CheckpointError, RecipeError, ServiceError
from ul2r.inference.pyfunc import make_pointer
from ul2r.model.export_metadata import ExportMetadata, read_export_metadata
from ul2r.paths import MODEL_CARD_FILE
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.workflows.model_card import RECIPE_HEADING

if TYPE_CHECKING:
    from ul2r.tracking.logged_model import ModelDetails

logger = logging.getLogger(__name__)


def find_server(recipe: Recipe) -> TrackingStore | None:
    """Return the MLflow server that an export is logged on, once it is known to answer.

    An export that is not to be registered needs no server: without one it is written all the same.

    Raises:
        RecipeError: If it is to be registered without a server.
        ServiceError: If it is to be registered and the server does not answer.
    """
    name = recipe.export.registered_model
    if recipe.tracking.uri == FILES:
        if name is None:
            return None
        raise RecipeError(
            f"export.registered_model={name}: only an MLflow server has a registry, and tracking.uri={FILES}: set "
            "either of the two to null"
        )
    if name is not None:
        return check_store(recipe.tracking.uri)

    # A run that was recorded in files, or never, has no record to log it in.
    if not recipe.paths.tracking_record.is_file():
        return None
    try:
        return check_store(recipe.tracking.uri)
    except ServiceError as error:
        logger.warning("%s: its export is not logged in MLflow: %s", recipe.name, error)
        return None


def log_export(recipe: Recipe, store: TrackingStore, folder: Path) -> str | None:
    """Log an export as a model of its run, and register it if the recipe names a registered model.

    Args:
        recipe: The run.
        store: An MLflow server.
        folder: The export.

    Returns:
        The URI of the registered version, None if it is not registered.

    Raises:
        CheckpointError: If it is to be registered and the server does not know the run.
        ServiceError: If the server fails.
    """
    name = recipe.export.registered_model
    # A model belongs to the run that it comes from.
    run_id = store.find_run(recipe.paths.folder)
    if run_id is None:
        if name is None:
            return None
        raise CheckpointError(
            f"MLflow at {store.uri} does not know run {recipe.name!r}: set tracking.uri to the server it was trained "
            "with"
        )

    # Here, since MLflow takes seconds to import.
    from ul2r.tracking import mlflow

    details = _describe_export(recipe, folder)
    if name is None:
        mlflow.log_export(store.uri, folder, run_id, details)
        return None
    version = mlflow.register(
        store.uri, name, folder, run_id, alias=recipe.export.alias, details=details
    )
    return f"models:/{name}/{version}"


def _describe_export(recipe: Recipe, folder: Path) -> ModelDetails:
    from ul2r.tracking.logged_model import ModelDetails

    metadata = read_export_metadata(folder)
    card = (folder / MODEL_CARD_FILE).read_text(encoding="utf-8")
    # Without the YAML in front, which is for the Hub, and the recipe, which is among the parameters of the run.
    card = card.removeprefix("---\n").partition("\n---\n")[2] if card.startswith("---\n") else card
    return ModelDetails(
        name=recipe.name,
        step=metadata.step or 0,
        pointer=make_pointer(folder),
        card=card.partition(f"\n{RECIPE_HEADING}")[0].strip(),
        tags=_list_tags(recipe, metadata),
        can_infill=metadata.denoising,
    )


def _list_tags(recipe: Recipe, metadata: ExportMetadata) -> dict[str, str]:
    vocabulary = metadata.vocabulary
    has_modes = metadata.denoising and vocabulary is not None
    tags = {
        "run": metadata.run,
        "role": metadata.role,
        "base": str(recipe.base) if recipe.base else None,
        "attention": metadata.attention,
        "modes": ", ".join(sorted(vocabulary.modes)) if has_modes and vocabulary else None,
        "tokens": None if metadata.tokens is None else str(metadata.tokens),
        "flops": None if metadata.flops is None else f"{metadata.flops:.4g}",
    }
    return {key: value for key, value in tags.items() if value is not None}
