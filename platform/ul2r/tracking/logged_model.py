"""Exports as MLflow's logged models, which its Python function flavor loads with prefix attention.

A logged model holds an MLmodel file, signature, input example and the place of the export; its weights stay where they
are (`ul2r.inference.pyfunc`).
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from ul2r import __version__
from ul2r.tracking.artifacts import translate_store_errors
from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.provenance import NOTE_TAG

LOADER_MODULE = "ul2r.inference.pyfunc"
"""By name: inference is above tracking."""
MAX_DESCRIPTION = 5000
"""Characters of a description in MLflow's registry (3.17, `SqlModelVersion`)."""
EXAMPLE = "def area(width, height):"
INFILLING_EXAMPLE = "def area(<slot>):\n    return <slot>\n"


@dataclass(frozen=True)
class ModelDetails:
    """Description of an export in MLflow.

    Attributes:
        name: The run's name.
        step: Step of its checkpoint.
        pointer: Content of the file that the loader reads, as of `make_pointer` there.
        card: Description in Markdown.
        tags: Tags of model and version.
        can_infill: Whether the input example has slots.
    """

    name: str
    step: int
    pointer: Mapping[str, str | None]
    card: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    can_infill: bool = False

    def describe(self, beginning: str = "") -> str:
        """Return the card behind another text, cut to the length that MLflow takes."""
        text = f"{beginning}\n\n{self.card}".strip("\n")
        if len(text) <= MAX_DESCRIPTION:
            return text
        end = "\n\n(the rest is in the export's README.md)"
        return text[: MAX_DESCRIPTION - len(end)].rpartition("\n")[0] + end


def log_model(uri: str, run_id: str, digest: str, details: ModelDetails) -> str:
    """Log an export as a model of its run, unless it has one of these weights in this folder; return the id.

    Args:
        uri: The MLflow server.
        run_id: The run.
        digest: Digest of the export, as of `hash_export`.
        details: Its description, which replaces that of an earlier call.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    # The folder belongs to what a model is: it is loaded from there.
    identity = identify_export(digest, Path(str(details.pointer["folder"])))
    tags = {**details.tags, **identity, NOTE_TAG: details.describe()}
    with translate_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        model_id = find_model(client, experiment, run_id, identity)
        if model_id is not None:
            client.set_logged_model_tags(model_id, tags)
            return model_id
        model = client.create_logged_model(
            experiment_id=experiment,
            name=re.sub(r"[/:.%\"']", "-", details.name),
            source_run_id=run_id,
            tags=tags,
            model_type="prefix-lm" if details.can_infill else "causal-lm",
        )

    model_id = str(model.model_id)
    with (
        translate_store_errors(uri, f"model {model_id} of run {run_id}"),
        tempfile.TemporaryDirectory() as folder,
    ):
        _write_model(Path(folder), run_id, model_id, details)
        client.log_model_artifacts(model_id, str(Path(folder) / "model"))
    with translate_errors(uri):
        client.log_outputs(run_id, [LoggedModelOutput(model_id, details.step)])
        # Last: what is ready has everything, and what is not is logged again.
        client.finalize_logged_model(model_id, "READY")
    return model_id


def identify_export(digest: str, folder: Path) -> dict[str, str]:
    """Return the tags by which the logged model of an export is found.

    Args:
        digest: Digest of the export, as of `hash_export`.
        folder: Its folder.
    """
    return {"digest": digest, "export_folder": str(folder.resolve())}


def find_model(
    client: MlflowClient, experiment: str, run_id: str, identity: Mapping[str, str]
) -> str | None:
    """Return the id of a run's model with these tags, None if it has none that is ready."""
    found = client.search_logged_models(
        experiment_ids=[experiment],
        filter_string=f"source_run_id = '{run_id}'",
    )
    # Not part of the filter, which compares a status with its number in the database (3.17).
    ready = [
        model
        for model in found
        if model.status == "READY" and identity.items() <= model.tags.items()
    ]
    return str(ready[0].model_id) if ready else None


def _write_model(folder: Path, run_id: str, model_id: str, details: ModelDetails) -> None:
    """Write the files of a logged model to `folder`/model."""
    # Here, since they take a second to import, which is not for jobs that log no model.
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema(
            [
                ColSpec("string", "text"),
                ColSpec(Array("string"), "fills"),
                ColSpec(Array("string"), "finish_reasons"),
            ]
        ),
        params=ParamSchema(
            [
                # None takes the default of completion or infilling.
                ParamSpec("mode", "string", None),
                ParamSpec("max_tokens", "long", None),
                ParamSpec("temperature", "double", 0.0),
                ParamSpec("seed", "long", 0),
                ParamSpec("slot", "string", "<slot>"),
            ]
        ),
    )
    pointer = folder / "export.json"
    pointer.write_text(json.dumps(details.pointer), encoding="utf-8")
    # It reports on INFO that it validates the example.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    example = INFILLING_EXAMPLE if details.can_infill else EXAMPLE
    mlflow.pyfunc.save_model(
        path=str(folder / "model"),
        loader_module=LOADER_MODULE,
        data_path=str(pointer),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=signature,
        input_example=([{"prompt": example}], {"max_tokens": 16}),
        # Given, since MLflow would else load the model to see what it imports.
        pip_requirements=[f"ul2r=={__version__}"],
    )
