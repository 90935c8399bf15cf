"""Exports measured, each run once, and their scores in files, model cards and the runs' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.evaluation.measure import Metric, list_metrics
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import find_export, load_scores
from ul2r.inference import read_export_metadata
from ul2r.tracking.names import (
    check_denoiser_names,
    name_evaluation,
    name_evaluation_stderr,
)
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.workflows.measure_exports import Measured, measure_exports
from ul2r.workflows.model_card import add_scores

INFILLED_FILE = "infilled_examples.json"
"""Table of infilled spans in a run's record."""
SCORES_HEADING = "Scores"
"""Section of a run's description."""


def evaluate_run(recipe: Recipe) -> Scores:
    """Measure a run's export unless it has scores, and add them to the run in MLflow.

    Raises:
        UserError: If the export is missing or does not fit the recipe, or the tracking server fails.
    """
    dataset = open_run_dataset(recipe)
    # Before measuring, which takes minutes: that the scores can be recorded.
    check_denoiser_names(recipe.evaluation.mixture, "evaluation.mixture")
    store = check_store(recipe.tracking.uri)
    store.require_run(recipe)

    (scores,) = evaluate_arms([(recipe, None)], dataset)
    log_scores(store, recipe, dataset, scores)

    return scores


def evaluate_arms(arms: Sequence[Measured], dataset: TokenDataset) -> list[Scores]:
    """Return the scores of each export and pretrained model; measure those that have none, in parallel.

    Args:
        arms: Runs of one storage, and models that are compared with them.
        dataset: Its token store.

    Raises:
        UserError: If an export is missing, or a model does not fit its recipe or the token store.
    """
    missing = [arm for arm in arms if load_scores(arm[0], dataset, arm[1]) is None]
    if missing:
        measure_exports(missing)

    # Read back from files: Ray's tasks ran on any machine of the cluster and returned notes only.
    stored = [load_scores(recipe, dataset, pretrained) for recipe, pretrained in arms]
    complete = [scores for scores in stored if scores is not None]
    for (recipe, pretrained), scores in zip(arms, complete, strict=True):
        # A pretrained model's folder is the user's, and left as it is.
        if pretrained is None:
            add_scores(find_export(recipe, dataset), scores)

    return complete


def log_scores(store: TrackingStore, recipe: Recipe, dataset: TokenDataset, scores: Scores) -> None:
    """Add scores and their standard errors to the run's record, its logged model and its description.

    They are recorded under the names of `ul2r.tracking.names`.

    Raises:
        ServiceError: If the server fails.
    """
    # MLflow shows the scores at the step of the checkpoint that was measured.
    export = find_export(recipe, dataset)
    step = read_export_metadata(export).step or 0
    run_id = store.require_run(recipe)
    store.log_summary(run_id, as_metrics(scores), step=step, export=export)
    measured = f"The export of step {step:,}" if step else "The export"
    table = tabulate_scores(scores, list_metrics(recipe.evaluation))
    store.note_run(run_id, SCORES_HEADING, f"{measured} on held-out text:\n\n{table}")
    # Scores of earlier versions were stored without them.
    if scores.infilled:
        store.log_table(run_id, tabulate_infilled({"answer": scores}), INFILLED_FILE)


def tabulate_infilled(scores: Mapping[str, Scores]) -> dict[str, list[object]]:
    """Return the infilled spans of several models side by side, by column.

    Args:
        scores: Scores of models that were measured on the same spans, by the heading of their answers.
    """
    any_scores = next(iter(scores.values()))
    table: dict[str, list[object]] = {
        name: [getattr(text, name) for text in any_scores.infilled]
        for name in ("left", "target", "right")
    }
    for heading, model_scores in scores.items():
        table[heading] = [text.answer for text in model_scores.infilled]
        table[f"{heading}: edit similarity"] = [
            round(text.edit_similarity, 3) for text in model_scores.infilled
        ]
    return table


def as_metrics(scores: Scores) -> dict[str, float]:
    """Return scores by the names that they have in a run's record."""
    means = {name_evaluation(name): score.mean for name, score in scores.values.items()}
    errors = {name_evaluation_stderr(name): score.stderr for name, score in scores.values.items()}
    return {**means, **errors}


def tabulate_scores(scores: Scores, metrics: Sequence[Metric]) -> str:
    """Return scores as a table in Markdown."""
    rows = [
        f"| {metric.title} | {scores[metric.name].format(metric.digits)} |" for metric in metrics
    ]
    return "\n".join(["| held out | mean ± standard error |", "|---|---:|", *rows])


def make_score_table(recipe: Recipe, scores: Scores) -> Table:
    """Return a run's scores as a table for a terminal."""
    table = Table("held out", title=recipe.name)
    for heading in ("mean", "± standard error", "rows"):
        table.add_column(heading, justify="right")

    for metric in list_metrics(recipe.evaluation):
        score = scores[metric.name]
        mean, error = score.format(metric.digits).split(" ± ")
        table.add_row(metric.title, mean, error, str(score.count))

    return table
