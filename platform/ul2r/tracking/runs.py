"""Runs in MLflow: flat, tagged with role and parent, continued under the same id."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from ul2r.config import Recipe, dump
from ul2r.errors import ServiceError
from ul2r.tracking.client import connect, translate_errors
from ul2r.tracking.tracker import RunStatus
from ul2r.tracking.view import ROLE_COLORS, RUN_COLOR_TAG, install_view

RECORD = "tracking.json"
"""File of a run folder that names its MLflow run."""


def start_run(
    recipe: Recipe, uri: str, tags: Mapping[str, str], params: Mapping[str, str | int | float]
) -> str:
    """Make the recipe's MLflow run, or take up the one that its run folder names; returns the run id.

    Raises:
        ServiceError: If the server fails.
    """
    parent = {"ul2r.parent": str(recipe.base)} if recipe.base else {}
    colour = {RUN_COLOR_TAG: ROLE_COLORS[recipe.role]} if recipe.role else {}
    own = {"ul2r.role": recipe.role or "none", **parent, **colour}
    run_id = continue_run(
        uri,
        recipe.tracking.experiment,
        recipe.name,
        recipe.paths.folder,
        tags={**own, **tags},
        params=params,
    )
    with translate_errors(uri):
        connect(uri).log_text(run_id, dump(recipe), "recipe.yaml")
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
) -> str:
    """The run that `folder` holds a record of, set RUNNING again; a new one where there is none.

    Tags are brought up to date; a parameter keeps its first value, which is MLflow's rule.

    Returns:
        The run id.

    Raises:
        ServiceError: If the server fails.
    """
    client = connect(uri)
    with translate_errors(uri):
        run = _recorded_run(uri, folder)
        if run is None:
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment)
            run = client.create_run(number, run_name=name)
            _record(folder, {"uri": uri, "experiment": experiment, "run_id": run.info.run_id})
        run_id: str = run.info.run_id
        client.update_run(run_id, status="RUNNING")
        new = [
            Param(key, str(value)) for key, value in params.items() if key not in run.data.params
        ]
        client.log_batch(
            run_id, params=new, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True
        )
    return run_id


def find_run(uri: str, folder: Path) -> str | None:
    """Id of the run that `folder` holds a record of, if the server at `uri` knows it."""
    with translate_errors(uri):
        run = _recorded_run(uri, folder)
    return run.info.run_id if run else None


def require_run(uri: str, recipe: Recipe) -> str:
    """Id of the recipe's run.

    Raises:
        ServiceError: If the server fails, or does not know the run.
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
        connect(uri).set_terminated(run_id, status)


def log_summary(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    artifacts: Iterable[Path] = (),
    step: int = 0,
) -> None:
    """Add results to a run, finished or not; a metric that has this value already is left alone.

    Raises:
        ServiceError: If the server fails.
    """
    client = connect(uri)
    now_ms = time.time_ns() // 1_000_000
    with translate_errors(uri):
        stored = client.get_run(run_id).data.metrics
        new = [
            Metric(key, float(value), now_ms, step)
            for key, value in metrics.items()
            if stored.get(key) != float(value)
        ]
        if new:
            client.log_batch(run_id, metrics=new, synchronous=True)
        for artifact in artifacts:
            client.log_artifact(run_id, str(artifact))


def log_artifact(uri: str, run_id: str, file: Path) -> None:
    """Keep a file among a run's artifacts, under its own name.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        connect(uri).log_artifact(run_id, str(file))


def read_metric_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric by rising step, the last logged where a step was taken again; empty if never logged.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        points = connect(uri).get_metric_history(run_id, metric)
    last = {
        int(point.step): float(point.value)
        for point in sorted(points, key=lambda point: point.timestamp)
    }
    return sorted(last.items())


def _recorded_run(uri: str, folder: Path) -> Run | None:
    """The run named in the folder's record, unless the server does not have it (any more)."""
    try:
        run_id = json.loads((folder / RECORD).read_text(encoding="utf-8"))["run_id"]
    except FileNotFoundError:
        return None
    try:
        run = connect(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _record(folder: Path, content: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{RECORD}.{os.getpid()}"
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder / RECORD)
