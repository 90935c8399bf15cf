"""A ready-made page of charts in an MLflow experiment: losses by compute and tokens, suites, a ladder's scores.

MLflow's web page keeps a shared view in a tag of the experiment. The tag's format is not documented: this is the one
that 3.17's page reads, verified in a browser (the bars of suites have not been seen in one). A later version that does
not understand it shows its default charts.
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
    name_suite_mean,
)
from ul2r.tracking.roles import COMPARISON_ROLE, FEW_SHOT_ROLE, GAPS_ROLE, LADDER_ROLE

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
SUITES = "suites"
SUITES_TITLE = "3. Few-shot and infilling suites, mean"
POINTS = "points"
POINTS_TITLE = "4. Scores of exports by training compute (petaFLOPs)"


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
        _, suites, scores = _read_view(client.get_experiment(experiment).tags.get(VIEW_TAG))
        state = build_view_state(denoisers, suites, scores)
        client.set_experiment_tag(experiment, VIEW_TAG, state)
        # Asked for, since people may choose another kind on the page.
        if KIND_TAG not in client.get_experiment(experiment).tags:
            client.set_experiment_tag(experiment, KIND_TAG, "custom_model_development")


def add_suite_to_view(uri: str, run_id: str, suite: str) -> None:
    """Add the bars of a suite's mean to the view of a run's experiment.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    with translate_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        denoisers, suites, scores = _read_view(client.get_experiment(experiment).tags.get(VIEW_TAG))
        if suite not in suites:
            state = build_view_state(denoisers, [*suites, suite], scores)
            client.set_experiment_tag(experiment, VIEW_TAG, state)


def add_scores_to_view(uri: str, run_id: str, scores: Sequence[str]) -> None:
    """Add scores over training compute, a point for each run, to the view of a run's experiment, and show all its runs.

    Args:
        uri: The tracking server.
        run_id: Any run of the experiment.
        scores: Names of metrics.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    with translate_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        denoisers, suites, shown = _read_view(client.get_experiment(experiment).tags.get(VIEW_TAG))
        state = build_view_state(denoisers, suites, list(dict.fromkeys([*shown, *scores])))
        client.set_experiment_tag(experiment, VIEW_TAG, state)


def _read_view(state: str | None) -> tuple[list[str], list[str], list[str]]:
    """Return the denoisers, the suites and the scores over compute of a view's state."""
    charts = json.loads(state)["compareRunCharts"] if state else []
    metrics = dict.fromkeys(chart["metricKey"] for chart in charts if chart["type"] == "LINE")
    losses = [name.removesuffix(name_held_out_loss("")) for name in metrics]
    names = [loss for loss, metric in zip(losses, metrics, strict=True) if loss != metric]
    suites = [chart["metricKey"].split("/")[1] for chart in charts if chart["type"] == "BAR"]
    scores = [chart["yaxis"]["key"] for chart in charts if chart["type"] == "SCATTER"]
    return [name for name in names if name != CAUSAL], suites, scores


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


def build_view_state(
    denoisers: Sequence[str], suites: Sequence[str] = (), scores: Sequence[str] = ()
) -> str:
    """Return the tag's JSON: charts of the causal loss, and of as many denoisers' losses, scores and suites as fit.

    Args:
        denoisers: Names of denoisers.
        suites: Names of suites, whose means are bars.
        scores: Names of metrics, which are points over training compute.
    """
    names, points, shown = [CAUSAL, *denoisers], list(scores), list(suites)
    # The causal loss is first, so it is always shown.
    while len(state := _dump_state(names, shown, points)) > MAX_TAG_LENGTH:
        (shown or points or names).pop()
    return state


def _dump_state(names: Sequence[str], suites: Sequence[str], points: Sequence[str]) -> str:
    # Any unique text serves as a uuid; charts name their section by it.
    sections = [
        {"uuid": _section_id(x_metric), "name": name, "display": True, "isReordered": False}
        for x_metric, name in (
            SECTIONS
            | ({SUITES: SUITES_TITLE} if suites else {})
            | ({POINTS: POINTS_TITLE} if points else {})
        ).items()
    ]
    charts = [_build_chart(name, x_metric) for x_metric in SECTIONS for name in names]
    charts += [
        {
            "type": "BAR",
            "uuid": f"{_section_id(SUITES)} {suite}",
            "metricSectionId": _section_id(SUITES),
            "metricKey": name_suite_mean(suite),
        }
        for suite in suites
    ]
    charts += [
        {
            "type": "SCATTER",
            "uuid": f"{_section_id(POINTS)} {score}",
            "metricSectionId": _section_id(POINTS),
            "displayName": score,
            "xaxis": {"key": PETAFLOPS, "type": "METRIC"},
            "yaxis": {"key": score, "type": "METRIC"},
        }
        for score in points
    ]
    scores = [
        *("causal_loss", "second_half_loss"),
        *(f"{DENOISER_LOSS}{name}" for name in names if name != CAUSAL),
        *("infill_loss", "infill_exact_match", "infill_edit_similarity"),
    ]
    columns = [*COLUMNS, *(f"metrics.`{name_evaluation(score)}`" for score in scores)]
    state = {
        # They have no curves: without the filter they would be in the legend of every chart.
        "searchFilter": " AND ".join(
            f"tags.`ul2r.role` != '{role}'"
            for role in (COMPARISON_ROLE, FEW_SHOT_ROLE, GAPS_ROLE, LADDER_ROLE)
        ),
        "selectedColumns": columns,
        "compareRunSections": sections,
        "compareRunCharts": charts,
        # The page's own choice is the newest ten: a ladder's curve would lack its other points.
        **({"runsHiddenMode": "SHOW_ALL"} if points else {}),
    }
    return json.dumps(state, separators=(",", ":"))


def _section_id(x_metric: str) -> str:
    # Short, as each chart repeats it.
    return str([*SECTIONS, SUITES, POINTS].index(x_metric))


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
