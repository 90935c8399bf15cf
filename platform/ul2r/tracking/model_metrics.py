"""Metrics of logged models: the scores of an export on its model's page, with the text that they were measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, Metric, Run

from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.export_digest import hash_export
from ul2r.tracking.logged_model import find_model, identify_export
from ul2r.tracking.provenance import CONTEXT_TAG


def link_metrics(uri: str, run_id: str, folder: Path, metrics: Mapping[str, float]) -> None:
    """Link metrics that a run has to its logged model of an export, so that the model's page shows them.

    Nothing happens if the export was not logged, or for metrics that are linked with these values already.

    Args:
        uri: The MLflow server.
        run_id: The run.
        folder: The export.
        metrics: Metrics that were logged to the run before.

    Raises:
        CheckpointError: If `folder` is not an export.
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    with translate_errors(uri):
        run = client.get_run(run_id)
        identity = identify_export(hash_export(folder), folder)
        model_id = find_model(client, run.info.experiment_id, run_id, identity)
        if model_id is None:
            return

        linked = {
            (metric.key, metric.value, metric.step)
            for metric in client.get_logged_model(model_id).metrics or ()
        }
        dataset = _find_held_out(run)
        new = [
            metric
            # Sent again as it is, with the model: MLflow (3.17, SQL) keeps a point that a run has once.
            for metric in (_find_last(client, run_id, key) for key in metrics)
            # Of a model MLflow keeps NaN as 0 (3.17), which would be read as a perfect score.
            if not math.isnan(metric.value)
            and (metric.key, metric.value, metric.step) not in linked
        ]
        if new:
            client.log_batch(
                run_id,
                metrics=[_attach(metric, run_id, model_id, dataset) for metric in new],
                synchronous=True,
            )


def _find_last(client: MlflowClient, run_id: str, key: str) -> Metric:
    """Return the newest point of a metric that a run has."""
    return max(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)


def _find_held_out(run: Run) -> Dataset | None:
    """Return the held-out text among a run's inputs, None if there is none."""
    for entry in run.inputs.dataset_inputs:
        if any((tag.key, tag.value) == (CONTEXT_TAG, "held_out") for tag in entry.tags):
            return entry.dataset
    return None


def _attach(metric: Metric, run_id: str, model_id: str, dataset: Dataset | None) -> Metric:
    return Metric(
        metric.key,
        metric.value,
        metric.timestamp,
        metric.step,
        model_id=model_id,
        dataset_name=dataset.name if dataset else None,
        dataset_digest=dataset.digest if dataset else None,
        run_id=run_id,
    )
