"""Runs in MLflow: flat, tagged with role and parent, continued under the same id."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from ul2r.config import Recipe, dump
from ul2r.errors import ServiceError
from ul2r.filesystem import write_atomically
from ul2r.paths import RunPaths
from ul2r.tracking.artifacts import open_experiment, translate_store_errors
from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.provenance import (
    CONTEXT_TAG,
    NOTE_TAG,
    describe_process,
    describe_run,
    flatten_recipe,
)
from ul2r.tracking.roles import ROLE_COLORS, describe_origin, find_base_folder
from ul2r.tracking.run_inputs import RunInput
from ul2r.tracking.tracker import RunStatus, status_after
from ul2r.tracking.view import RUN_COLOR_TAG, install_view

MAX_PARAM_LENGTH = 6000
"""Characters that MLflow allows in a parameter: a mixture of some hundred denoisers has more."""
MAX_BATCH_PARAMS = 100
"""MLflow's limit of one request."""
DIGEST_LENGTH = 12
"""Characters of a fingerprint in the digest of a data set, of which MLflow allows 36; its source has all of them."""

_log = logging.getLogger(__name__)


def start_run(
    recipe: Recipe,
    uri: str,
    tags: Mapping[str, str],
    params: Mapping[str, str | int | float],
    inputs: Sequence[RunInput] = (),
) -> str:
    """Create the recipe's MLflow run, or continue the one that its run folder names; return the run id.

    Args:
        recipe: The run; its settings become parameters, by dotted key.
        uri: The tracking server.
        tags: Tags besides those of its origin.
        params: Parameters besides its settings.
        inputs: The text that it reads.

    Raises:
        ServiceError: If the server fails.
    """
    color = {RUN_COLOR_TAG: ROLE_COLORS[recipe.role]} if recipe.role else {}
    base_folder = find_base_folder(recipe)
    with translate_errors(uri):
        parent = _find_recorded_run(uri, base_folder) if base_folder else None
    run_id = continue_run(
        uri,
        recipe.tracking.experiment,
        recipe.name,
        recipe.paths.folder,
        tags={**describe_origin(recipe, parent.info.run_id if parent else None), **color, **tags},
        params={**flatten_recipe(recipe), **params},
        note=describe_run(recipe, params, inputs, _format_page(parent) if parent else None),
    )

    with end_on_error(uri, run_id):
        _log_inputs(uri, run_id, inputs)
        # The recipe of the last attempt, which may differ in layout or launch from that of the first.
        with translate_store_errors(uri, f"run {run_id}"):
            create_client(uri).log_text(run_id, dump(recipe), "recipe.yaml")
        install_view(uri, run_id, [denoiser.name for denoiser in recipe.evaluation.mixture])
    return run_id


def continue_run(
    uri: str,
    experiment: str,
    name: str,
    folder: Path,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, str | int | float],
    note: str | None = None,
) -> str:
    """Set the run that `folder` has a record of to RUNNING again; create a new one if there is none.

    Tags are updated, and the user, program and commit of this process are among them. A parameter keeps its first
    value, which MLflow refuses to change, and a run its description, which may have been edited on its page.

    Returns:
        The run id.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    process = describe_process()
    with translate_errors(uri):
        # By the record in the run's folder and not by name: MLflow's run names are not unique.
        run = _find_recorded_run(uri, folder)
        if run is None:
            experiment_id = open_experiment(uri, experiment).experiment_id
            # With these tags: MLflow takes the user of the run from them when it is created.
            run = client.create_run(experiment_id, run_name=name, tags=process)
            # At once, before requests that may fail: the next attempt must find this run instead of creating another.
            _write_record(folder, uri, experiment, run.info.run_id)

        run_id: str = run.info.run_id
        client.update_run(run_id, status="RUNNING")
        all_tags = {**process, **tags}
        if note is not None and NOTE_TAG not in run.data.tags:
            all_tags[NOTE_TAG] = note
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in all_tags.items()], synchronous=True)
        # MLflow refuses the whole batch if it has another value of one of the parameters.
        new = [
            Param(key, str(value)[:MAX_PARAM_LENGTH])
            for key, value in params.items()
            if key not in run.data.params
        ]
        for start in range(0, len(new), MAX_BATCH_PARAMS):
            batch = new[start : start + MAX_BATCH_PARAMS]
            client.log_batch(run_id, params=batch, synchronous=True)
    return run_id


def find_run(uri: str, folder: Path) -> str | None:
    """Return the id of the run that `folder` has a record of, None if the server at `uri` does not have it."""
    with translate_errors(uri):
        run = _find_recorded_run(uri, folder)
    return run.info.run_id if run else None


def require_run(uri: str, recipe: Recipe) -> str:
    """Return the id of the recipe's run.

    Raises:
        ServiceError: If the server fails, or does not have the run.
    """
    run_id = find_run(uri, recipe.paths.folder)
    if run_id is None:
        raise ServiceError(
            f"run {recipe.name!r} is not known to MLflow at {uri}: train it first, or set tracking.uri to the server "
            "it was trained with"
        )
    return run_id


def end_run(uri: str, run_id: str, status: RunStatus) -> None:
    """Set a run's final status.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        create_client(uri).set_terminated(run_id, status)


@contextmanager
def end_on_error(uri: str, run_id: str) -> Iterator[None]:
    """End a run that this process has opened if the block fails: as KILLED if it was interrupted, else as FAILED."""
    try:
        yield
    except BaseException as error:
        try:
            end_run(uri, run_id, status_after(error))
        except ServiceError as failure:
            # Not raised: it would hide the reason of the first one.
            _log.error("run %s stays RUNNING: %s", run_id, failure)
        raise


def log_summary(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    artifacts: Iterable[Path] = (),
    step: int = 0,
) -> None:
    """Add results to a run, finished or not; skip metrics that have this value already.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    now_ms = time.time_ns() // 1_000_000

    with translate_errors(uri):
        stored = client.get_run(run_id).data.metrics
        new = [
            Metric(key, float(value), now_ms, step)
            for key, value in metrics.items()
            # A job that is run again would add the same value under a new timestamp.
            if key not in stored or not _is_stored_as(float(value), stored[key])
        ]
        if new:
            client.log_batch(run_id, metrics=new, synchronous=True)
    for artifact in artifacts:
        log_artifact(uri, run_id, artifact)


def log_artifact(uri: str, run_id: str, file: Path) -> None:
    """Upload a file to a run's artifacts, under its own name.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_store_errors(uri, f"run {run_id}"):
        create_client(uri).log_artifact(run_id, str(file))


def read_metric_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) of one metric by rising step; empty if never logged.

    Of a step that was taken again after a rewind, the last value counts.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        points = create_client(uri).get_metric_history(run_id, metric)

    # The store returns points in no defined order. `MlflowTracker` gives later passes over a step later timestamps.
    points = sorted(points, key=lambda point: point.timestamp)
    last = {int(point.step): float(point.value) for point in points}
    return sorted(last.items())


def _format_page(run: Run) -> str:
    """Return the address of a run's page, relative to any page of MLflow."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _log_inputs(uri: str, run_id: str, inputs: Sequence[RunInput]) -> None:
    """Add what a run reads to its inputs; what it has already is not added again."""
    # As `mlflow.log_input` does for the fluent API's active run. Data sets of another name, since MLflow keeps an input
    # of a run by its data set alone: of one under two contexts the second would be dropped.
    datasets = [
        DatasetInput(
            Dataset(
                name=entry.name,
                digest=entry.fingerprint[:DIGEST_LENGTH],
                # A type that `mlflow.data.get_source` loads; it reads the key "uri" alone.
                source_type="local",
                source=json.dumps(
                    {
                        "uri": str(entry.folder),
                        "sources": list(entry.sources),
                        "fingerprint": entry.fingerprint,
                    }
                ),
                profile=json.dumps(
                    {"num_tokens": entry.num_tokens, "num_documents": entry.num_documents}
                ),
            ),
            [InputTag(CONTEXT_TAG, entry.context)],
        )
        for entry in inputs
    ]
    if datasets:
        with translate_errors(uri):
            create_client(uri).log_inputs(run_id, datasets)


def _is_stored_as(value: float, stored: float) -> bool:
    """Return whether a store that was given `value` returns `stored`."""
    if math.isnan(value):
        return math.isnan(stored)
    # SQL has no infinity: MLflow stores the largest number instead.
    return stored == min(max(value, -sys.float_info.max), sys.float_info.max)


def _find_recorded_run(uri: str, folder: Path) -> Run | None:
    """Return the run named in the folder's record, None without a record or if the server has deleted the run."""
    try:
        record = RunPaths(folder).tracking_record.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None

    try:
        run = create_client(uri).get_run(json.loads(record)["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    # MLflow still returns a run that was deleted on its page, until its garbage collection.
    return run if run.info.lifecycle_stage == "active" else None


def _write_record(folder: Path, uri: str, experiment: str, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"uri": uri, "experiment": experiment, "run_id": run_id}
    write_atomically(RunPaths(folder).tracking_record, json.dumps(content, indent=2) + "\n")
