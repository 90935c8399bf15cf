"""Exports measured in Ray tasks, each run once, and their scores in files, model cards and MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray
import torch
from ray.exceptions import RayTaskError
from rich.table import Table

from ul2r.config import Recipe
from ul2r.console import show_progress
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import UserError
from ul2r.evaluation.measure import list_metrics, measure
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import find_export, load_scores, save_scores
from ul2r.inference import LanguageModel, read_export_metadata
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.tracking.mlflow import check_server, log_summary, require_run
from ul2r.tracking.names import check_denoiser_names
from ul2r.workflows.model_card import add_scores


def evaluate_run(recipe: Recipe) -> Scores:
    """Measure a run's export unless it has scores, and add them to the run in MLflow.

    Raises:
        UserError: If the export is missing or does not fit the recipe, or the tracking server fails.
    """
    dataset = open_dataset(recipe.storage_paths.store)
    # Before measuring, which takes minutes: that the scores can be recorded.
    check_denoiser_names(recipe.evaluation.mixture, "evaluation.mixture")
    uri = check_server(recipe.tracking.uri)
    require_run(uri, recipe)

    (scores,) = evaluate_runs([recipe], dataset)
    log_scores(uri, recipe, dataset, scores)

    return scores


def evaluate_runs(recipes: Sequence[Recipe], dataset: TokenDataset) -> list[Scores]:
    """Return the scores of each recipe's export; measure those that have none, in parallel.

    Args:
        recipes: Runs of one storage.
        dataset: Its token store.

    Raises:
        UserError: If an export is missing, or does not fit its recipe or the token store.
    """
    # Without missing scores no cluster is started.
    missing = [recipe for recipe in recipes if load_scores(recipe, dataset) is None]
    if missing:
        # For the largest task alone: the others wait until Ray has resources for them.
        gpus = max(recipe.launch.gpus_per_worker for recipe in missing)
        with connect_ray(cpus=1, gpus=gpus):
            _measure_all(missing)

    # Read back from files: the tasks ran on any machine of the cluster and returned notes only.
    stored = [load_scores(recipe, dataset) for recipe in recipes]
    complete = [scores for scores in stored if scores is not None]
    for recipe, scores in zip(recipes, complete, strict=True):
        add_scores(find_export(recipe, dataset), scores)

    return complete


def log_scores(uri: str, recipe: Recipe, dataset: TokenDataset, scores: Scores) -> None:
    """Log scores to the run in MLflow: evaluation/<metric>, and evaluation_stderr/<metric> for standard errors.

    Raises:
        ServiceError: If the server fails.
    """
    run_id = require_run(uri, recipe)
    means = {f"evaluation/{name}": score.mean for name, score in scores.values.items()}
    errors = {f"evaluation_stderr/{name}": score.stderr for name, score in scores.values.items()}
    # MLflow shows the scores at the step of the checkpoint that was measured.
    step = read_export_metadata(find_export(recipe, dataset)).step or 0

    log_summary(uri, run_id, {**means, **errors}, step=step)


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


def _measure_all(recipes: Sequence[Recipe]) -> None:
    """Run a task for each recipe and show how many metrics are done."""
    tasks = set()
    for recipe in recipes:
        gpus = recipe.launch.gpus_per_worker
        # "streaming" makes the task a generator, whose notes arrive one by one while it runs.
        task = ray.remote(num_cpus=1, num_gpus=gpus, num_returns="streaming")(_measure)
        tasks.add(task.remote(recipe))

    total = sum(len(list_metrics(recipe.evaluation)) for recipe in recipes)
    num_done = 0

    with show_progress("evaluate", total, "metrics") as bar:
        # Shows the bar while models are still loading.
        bar.update(0)
        while tasks:
            # Ray waits for generators as for results: one is ready when its next note is, or when it has ended.
            (ready, *_), _ = ray.wait(list(tasks), num_returns=1)
            try:
                note = ray.get(next(ready))
            except StopIteration:  # the generator is exhausted: its task has ended
                tasks.remove(ready)
                continue
            except RayTaskError as error:
                # Ray wraps what a task raises; a job reports user errors as they are.
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            num_done += 1
            bar.update(num_done, note)


def _measure(recipe: Recipe) -> Iterator[str]:
    """Measure one run and store its scores; yield a note after each metric."""
    torch.set_num_threads(1)  # the task reserves one CPU
    dataset = open_dataset(recipe.storage_paths.store)
    device = "cuda" if recipe.launch.gpus_per_worker else "cpu"
    model = LanguageModel.load(find_export(recipe, dataset), device)

    scores = {}
    for name, score in measure(model, dataset, recipe):
        scores[name] = score
        yield f"{recipe.name} {name}"
    # Only complete scores are stored: a task that fails halfway is measured again from the start.
    save_scores(recipe, dataset, Scores(scores))
