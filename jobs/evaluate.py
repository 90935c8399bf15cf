"""Measure a run on held-out text.

    python jobs/evaluate.py RECIPE [--set evaluation.num_rows=128]

Measures the run's export, prints the numbers, keeps them in the run's folder as evaluation.json and adds them
to the run in MLflow. A run that was measured with these settings before is not measured again.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from ul2r.config import Recipe
from ul2r.data.store.dataset import open_dataset
from ul2r.evaluation.evaluate import metrics
from ul2r.evaluation.scores import Scores
from ul2r.tracking.mlflow import check_server, require_run
from ul2r.workflows.cli import run_job
from ul2r.workflows.evaluate import evaluate_runs, log_scores


def main(recipe: Recipe) -> None:
    """Measure, record and print."""
    dataset = open_dataset(recipe.storage_paths.store)
    uri = check_server(recipe.tracking.uri)
    require_run(uri, recipe)
    (scores,) = evaluate_runs([recipe], dataset)
    log_scores(uri, recipe, dataset, scores)
    Console().print(_table(recipe, scores))


def _table(recipe: Recipe, scores: Scores) -> Table:
    table = Table("held out", title=recipe.name)
    for heading in ("mean", "± standard error", "rows"):
        table.add_column(heading, justify="right")
    for metric in metrics(recipe.evaluation):
        score = scores[metric.name]
        mean, error = (f"{value:.{metric.digits}f}" for value in (score.mean, score.error))
        table.add_row(metric.title, mean, error, str(score.count))
    return table


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Recipe, main))
