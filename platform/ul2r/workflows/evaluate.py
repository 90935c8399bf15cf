"""Exports measured as Ray tasks, each run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray
import torch
from ray.exceptions import RayTaskError

from ul2r.config import Recipe
from ul2r.console import show_progress
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import UserError
from ul2r.evaluation.evaluate import export_folder, measure, metrics, store_scores, stored_scores
from ul2r.evaluation.scores import Scores
from ul2r.inference import LanguageModel, read_export_metadata
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.tracking.mlflow import log_summary, require_run
from ul2r.workflows.model_card import add_scores


def evaluate_runs(recipes: Sequence[Recipe], dataset: TokenDataset) -> list[Scores]:
    """Scores of each recipe's export, measured in parallel where they have not been before.

    Args:
        recipes: Runs of one storage.
        dataset: Its token store.

    Raises:
        UserError: If an export is missing, or does not fit its recipe or the token store.
    """
    missing = [recipe for recipe in recipes if stored_scores(recipe, dataset) is None]
    if missing:
        gpus = max(recipe.launch.gpus_per_worker for recipe in missing)
        with connect_ray(cpus=1, gpus=gpus):
            _measure_all(missing)
    found = [stored_scores(recipe, dataset) for recipe in recipes]
    known = [scores for scores in found if scores is not None]
    for recipe, scores in zip(recipes, known, strict=True):
        add_scores(export_folder(recipe, dataset), scores)
    return known


def log_scores(uri: str, recipe: Recipe, dataset: TokenDataset, scores: Scores) -> None:
    """Add scores to the run in MLflow: evaluation/<metric>, and evaluation_error/<metric> for standard errors.

    Raises:
        ServiceError: If the server fails.
    """
    run_id = require_run(uri, recipe)
    means = {f"evaluation/{name}": score.mean for name, score in scores.values.items()}
    errors = {f"evaluation_error/{name}": score.error for name, score in scores.values.items()}
    step = read_export_metadata(export_folder(recipe, dataset)).step or 0
    log_summary(uri, run_id, {**means, **errors}, step=step)


def _measure_all(recipes: Sequence[Recipe]) -> None:
    """Run a task for each recipe, and show how many metrics are done."""
    tasks = {
        ray.remote(num_cpus=1, num_gpus=recipe.launch.gpus_per_worker, num_returns="streaming")(
            _measure
        ).remote(recipe)
        for recipe in recipes
    }
    total = sum(len(metrics(recipe.evaluation)) for recipe in recipes)
    done = 0
    with show_progress("evaluate", total, "metrics") as bar:
        bar.update(0)
        while tasks:
            (ready, *_), _ = ray.wait(list(tasks), num_returns=1)
            try:
                note = ray.get(next(ready))
            except StopIteration:
                tasks.remove(ready)
                continue
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            done += 1
            bar.update(done, note)


def _measure(recipe: Recipe) -> Iterator[str]:
    """Measure one run and keep its scores; yields a line after each metric."""
    torch.set_num_threads(1)
    dataset = open_dataset(recipe.storage_paths.store)
    device = "cuda" if recipe.launch.gpus_per_worker else "cpu"
    model = LanguageModel.load(export_folder(recipe, dataset), device)
    scores = {}
    for name, score in measure(model, dataset, recipe):
        scores[name] = score
        yield f"{recipe.name} {name}"
    store_scores(recipe, dataset, Scores(scores))
