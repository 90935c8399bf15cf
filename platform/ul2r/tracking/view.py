"""A ready-made page of charts in an MLflow experiment: held-out losses against training compute and tokens.

MLflow's web page keeps a shared view in a tag of the experiment. The tag's format is not documented: this is what
3.17's page reads, seen in a browser. Where a later one reads it otherwise, it shows its usual charts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ul2r.tracking.client import connect, translate_errors

KEY = "ul2r"
TAG = f"mlflow.sharedViewState.{KEY}"
TAG_LENGTH = 5000
"""Characters that MLflow allows a tag of an experiment."""
RUN_COLOR_TAG = "mlflow.runColor"
ROLE_COLORS: Mapping[str, str] = {"base": "#999999", "control": "#0072B2", "ul2r": "#D55E00"}
"""By role; told apart without colour vision (Okabe and Ito 2008)."""
SECTIONS = {
    "progress/eflops": "1. Held-out loss by training compute (EFLOPs)",
    "progress/tokens": "2. Held-out loss by training tokens",
}
"""Names, by which the page sorts them, by the metric on the x-axis."""


def install_view(uri: str, run_id: str, denoisers: Sequence[str]) -> None:
    """Put the view into the experiment of a run.

    Args:
        uri: The tracking server.
        run_id: Any run of the experiment.
        denoisers: Names of those whose held-out losses are logged.

    Raises:
        ServiceError: If the server fails.
    """
    client = connect(uri)
    with translate_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        client.set_experiment_tag(experiment, TAG, view_state(denoisers))


def list_view_urls(uri: str) -> dict[str, str]:
    """Addresses of the views, by experiment.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        experiments = connect(uri).search_experiments()
    return {
        experiment.name: f"{uri}/#/experiments/{experiment.experiment_id}/runs"
        f"?viewStateShareKey={KEY}&compareRunsMode=CHART"
        for experiment in experiments
        if TAG in experiment.tags
    }


def view_state(denoisers: Sequence[str]) -> str:
    """The tag's text: charts of the causal loss and each denoiser's, the last ones left out where they do not fit."""
    names = ["causal", *denoisers]
    while len(state := _state(names)) > TAG_LENGTH:
        names.pop()
    return state


def _state(names: Sequence[str]) -> str:
    sections = [
        {"uuid": x_metric, "name": name, "display": True, "isReordered": False}
        for x_metric, name in SECTIONS.items()
    ]
    charts = [_chart(name, x_metric) for x_metric in SECTIONS for name in names]
    state = {"compareRunSections": sections, "compareRunCharts": charts}
    return json.dumps(state, separators=(",", ":"))


def _chart(name: str, x_metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"{x_metric} {name}",
        "metricSectionId": x_metric,
        "metricKey": f"held_out/loss/{name}",
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": x_metric,
        "useGlobalXaxisKey": False,
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
    }
