"""A ready-made page of charts in an MLflow experiment: held-out losses by training compute and by tokens.

MLflow's web page keeps a shared view in a tag of the experiment. The tag's format is not documented: this is the one
that 3.17's page reads, verified in a browser. A later version that does not understand it shows its default charts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.names import (
    CAUSAL,
    DENOISER_LOSS,
    PETAFLOPS,
    TOKENS,
    name_evaluation,
    name_held_out_loss,
)
from ul2r.tracking.roles import COMPARISON_ROLE

VIEW_KEY = "ul2r"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
MAX_TAG_LENGTH = 5000
"""Characters that MLflow allows in a tag of an experiment."""
KIND_TAG = "mlflow.experimentKind"
"""Tag of an experiment's kind: one without it may be shown as one of GenAI, whose page has no training runs."""
RUN_COLOR_TAG = "mlflow.runColor"
"""Tag that MLflow's page reads a run's line color from; not documented either."""
COLUMNS = (
    "attributes.`Dataset`",
    "attributes.`User`",
    "attributes.`Source`",
    "attributes.`Version`",
    "params.`parameters`",
    "params.`mixture`",
    f"metrics.`{PETAFLOPS}`",
)
"""Columns of the table of runs besides the scores of their evaluation."""
SECTIONS = {
    PETAFLOPS: "1. Held-out loss by training compute (petaFLOPs)",
    TOKENS: "2. Held-out loss by training tokens",
}
"""Section titles by the metric of the x-axis. MLflow sorts sections by title, hence the numbers."""


def install_view(uri: str, run_id: str, denoisers: Sequence[str]) -> None:
    """Add the view to the experiment of a run.

    Args:
        uri: The tracking server.
        run_id: Any run of the experiment.
        denoisers: Names of the denoisers whose held-out losses are logged.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    with translate_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        client.set_experiment_tag(experiment, VIEW_TAG, build_view_state(denoisers))
        # Asked for, since people may choose another kind on the page.
        if KIND_TAG not in client.get_experiment(experiment).tags:
            client.set_experiment_tag(experiment, KIND_TAG, "custom_model_development")


def find_view_url(uri: str, run_id: str) -> str:
    """Return the address of the view of a run's experiment.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        experiment = create_client(uri).get_run(run_id).info.experiment_id
    return _make_view_url(uri, experiment)


def list_view_urls(uri: str) -> dict[str, str]:
    """Return the addresses of the views, by name of the experiment.

    Raises:
        ServiceError: If the server fails.
    """
    with translate_errors(uri):
        experiments = create_client(uri).search_experiments()

    return {
        experiment.name: _make_view_url(uri, experiment.experiment_id)
        for experiment in experiments
        if VIEW_TAG in experiment.tags
    }


def _make_view_url(uri: str, experiment_id: str) -> str:
    return (
        f"{uri}/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={VIEW_KEY}&compareRunsMode=CHART"
    )


def build_view_state(denoisers: Sequence[str]) -> str:
    """Return the tag's JSON: charts of the causal loss and of as many denoisers' losses as fit."""
    names = [CAUSAL, *denoisers]
    # The causal loss is first, so it is always shown.
    while len(state := _dump_state(names)) > MAX_TAG_LENGTH:
        names.pop()
    return state


def _dump_state(names: Sequence[str]) -> str:
    # Any unique text serves as a uuid; charts name their section by it.
    sections = [
        {"uuid": _section_id(x_metric), "name": name, "display": True, "isReordered": False}
        for x_metric, name in SECTIONS.items()
    ]
    charts = [_build_chart(name, x_metric) for x_metric in SECTIONS for name in names]
    scores = [
        *("causal_loss", "second_half_loss"),
        *(f"{DENOISER_LOSS}{name}" for name in names if name != CAUSAL),
        *("infill_loss", "infill_exact_match", "infill_edit_similarity"),
    ]
    columns = [*COLUMNS, *(f"metrics.`{name_evaluation(score)}`" for score in scores)]
    state = {
        # A comparison has no curves: without the filter it would be in the legend of every chart.
        "searchFilter": f"tags.`ul2r.role` != '{COMPARISON_ROLE}'",
        "selectedColumns": columns,
        "compareRunSections": sections,
        "compareRunCharts": charts,
    }
    return json.dumps(state, separators=(",", ":"))


def _section_id(x_metric: str) -> str:
    # Short, as each chart repeats it.
    return str(list(SECTIONS).index(x_metric))


def _build_chart(name: str, x_metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"{_section_id(x_metric)} {name}",
        "metricSectionId": _section_id(x_metric),
        "metricKey": name_held_out_loss(name),
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": x_metric,
        # A chart otherwise follows the page's own x-axis and smoothing, and ignores what is set here.
        "useGlobalXaxisKey": False,
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
    }
