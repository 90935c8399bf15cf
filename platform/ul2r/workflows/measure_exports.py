"""Exports and pretrained models measured in Ray tasks, or one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from ul2r.config import Recipe
from ul2r.console import ProgressBar, show_progress
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.environment import has_ray, has_ray_cluster
from ul2r.errors import UserError
from ul2r.evaluation.examples import choose_examples
from ul2r.evaluation.measure import list_metrics, measure
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.scores import InfilledText, Scores
from ul2r.evaluation.stored_scores import find_export, load_scores, save_scores
from ul2r.inference import LanguageModel
from ul2r.inference.pretrained import PretrainedModel

Measured = tuple[Recipe, PretrainedArm | None]
"""A run whose export is measured, or a pretrained model that is measured in its place with the recipe's settings."""


def measure_exports(arms: Sequence[Measured]) -> None:
    """Measure exports and pretrained models and store their scores; show how many metrics are done.

    Raises:
        UserError: If one does not fit its recipe or the token store.
    """
    # Ray takes seconds to start: worth it on a cluster, or for several at once.
    if has_ray_cluster() or (len(arms) > 1 and has_ray()):
        _measure_in_ray(arms)
    else:
        _measure_here(arms)


def measure_missing(recipe: Recipe, dataset: TokenDataset) -> None:
    """Measure a run's export in this process, unless it has scores.

    Raises:
        UserError: If there is no export, or it does not fit the recipe or the token store.
    """
    if load_scores(recipe, dataset) is None:
        _measure_here([(recipe, None)])


def _measure_here(arms: Sequence[Measured]) -> None:
    with _show_metrics(arms) as bar:
        # Shows the bar while a model is still loading.
        bar.update(0)
        notes = (note for arm in arms for note in _measure(*arm))
        for num_done, note in enumerate(notes, start=1):
            bar.update(num_done, note)


def _measure_in_ray(arms: Sequence[Measured]) -> None:
    """Run a task for each model, as many at once as the cluster has room for."""
    # Here, since Ray takes seconds to import and may be absent.
    import ray
    from ray.exceptions import RayTaskError

    from ul2r.launch.ray_train.cluster import connect_ray

    # For the largest task alone: the others wait until Ray has resources for them.
    most_gpus = max(recipe.launch.gpus_per_worker for recipe, _ in arms)
    with connect_ray(cpus=1, gpus=most_gpus):
        tasks = set()
        for recipe, pretrained in arms:
            gpus = recipe.launch.gpus_per_worker
            # "streaming" makes the task a generator, whose notes arrive one by one while it runs.
            task = ray.remote(num_cpus=1, num_gpus=gpus, num_returns="streaming")(_measure)
            tasks.add(task.remote(recipe, pretrained))

        num_done = 0
        with _show_metrics(arms) as bar:
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


def _show_metrics(arms: Sequence[Measured]) -> AbstractContextManager[ProgressBar]:
    """Show a bar of the metrics of all models."""
    total = sum(len(list_metrics(recipe.evaluation)) for recipe, _ in arms)
    return show_progress("evaluate", total, "metrics")


def _measure(recipe: Recipe, pretrained: PretrainedArm | None) -> Iterator[str]:
    """Measure one model and store its scores; yield a note after each metric."""
    torch.set_num_threads(1)  # a task reserves one CPU
    dataset = open_run_dataset(recipe)
    device = "cuda" if recipe.launch.gpus_per_worker else "cpu"
    model = _load(recipe, pretrained, dataset, device)

    scores = {}
    infilled: list[InfilledText] = []
    for name, score in measure(model, dataset, recipe, infilled):
        scores[name] = score
        yield f"{(pretrained or recipe).name} {name}"
    # Here, where the model is loaded: an export is written without. A pretrained model's folder takes none.
    examples = () if pretrained else choose_examples(model, dataset, recipe.evaluation)
    # Only complete scores are stored: a task that fails halfway is measured again from the start.
    save_scores(recipe, dataset, Scores(scores, tuple(infilled), examples), pretrained)


def _load(
    recipe: Recipe, pretrained: PretrainedArm | None, dataset: TokenDataset, device: str
) -> LanguageModel:
    if pretrained is None:
        return LanguageModel.load(find_export(recipe, dataset), device)
    return PretrainedModel.load_with_vocabulary(
        pretrained.model_folder, dataset.vocabulary, dataset.tokenizer_file, device
    )
