"""Suites run on a run's export, or on a model in its place, and their results in files and in the run's record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from ul2r.config import Recipe
from ul2r.config.few_shot import FewShot
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.evaluation.code_execution import check_confinement
from ul2r.evaluation.few_shot.items import ITEMS_FILE, read_first_items
from ul2r.evaluation.few_shot.requirements import require_lm_eval
from ul2r.evaluation.few_shot.running import Subject, SuiteRun, Task
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.evaluation.few_shot.suites import Suite, load_suites
from ul2r.evaluation.few_shot.task_loading import (
    Unavailable,
    describe_unavailable,
    load_tasks,
)
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.inference import LanguageModel, read_export_metadata
from ul2r.inference.document_start import read_document_start
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder
from ul2r.paths import RunPaths
from ul2r.tracking.export_digest import hash_export
from ul2r.tracking.names import is_metric_name, name_suite_mean
from ul2r.tracking.roles import FEW_SHOT_ROLE
from ul2r.tracking.store import TrackingStore, check_store

logger = logging.getLogger(__name__)

TABLE_ITEMS = 200
"""Items in the table of a record; all are in items.parquet."""


def run_suites(
    recipe: Recipe, *, allow_code_execution: bool = False
) -> list[tuple[SuiteResult, Path]]:
    """Run the recipe's suites on its export, or on `evaluation.few_shot.model`; return results and their folders.

    Args:
        recipe: The recipe.
        allow_code_execution: Run code that the model writes, which the scores of some suites need.

    Raises:
        UserError: If a suite, a task, its data or the model is missing, or the tracking server fails.
    """
    require_lm_eval()
    settings = recipe.evaluation.few_shot
    # What can refuse comes first: a suite takes minutes to days.
    suites = load_suites(settings.suites)
    _check_code_execution(suites, recipe, is_allowed=allow_code_execution)
    folder, paths, digest = _find_model(recipe)
    store = check_store(recipe.tracking.uri)
    store.check_experiment(recipe.tracking.experiment)
    loaded = {
        name: _load_tasks(load_tasks(suite, recipe.evaluation.data, settings.tasks), recipe)
        for name, suite in suites.items()
    }
    subject = _load_model(recipe, folder, digest)
    runs = {
        name: SuiteRun(
            subject, name, tasks, settings, _describe_left_out(suites[name], unavailable, settings)
        )
        for name, (tasks, unavailable) in loaded.items()
    }

    results = []
    for name, run in runs.items():
        target = paths.few_shot / name / run.label
        result = run.execute(target)
        model_run = store.find_run(paths.folder)
        _record(store, recipe, result, target, model_run)
        if model_run is not None and _is_whole(settings):
            # The model's own run has the scores as well: charts show runs side by side.
            step = read_export_metadata(folder).step or 0
            store.log_summary(model_run, name_headlines(result), step=step)
            store.show_suite(model_run, name)
        results.append((result, target))
    return results


def check_suites(recipe: Recipe) -> None:
    """Check before a model exists that the recipe's suites can be run on it.

    Raises:
        UserError: If a suite, a task or its data is missing, or a suite runs code.
    """
    require_lm_eval()
    settings = recipe.evaluation.few_shot
    suites = load_suites(settings.suites)
    _check_code_execution(suites, recipe, is_allowed=False)
    for suite in suites.values():
        _load_tasks(load_tasks(suite, recipe.evaluation.data, settings.tasks), recipe)


def _is_whole(settings: FewShot) -> bool:
    """Return whether whole suites are run, in the form that the model was trained for."""
    others = {"suites", "model", "skip_missing", "seeds", "samples", "temperature"}
    defaults = FewShot().model_dump(exclude=others)
    return settings.model_dump(exclude=others) == defaults


def _check_code_execution(suites: Mapping[str, Suite], recipe: Recipe, *, is_allowed: bool) -> None:
    """Refuse suites that run what a model writes, unless this is allowed; say what this machine does not prevent.

    Raises:
        RecipeError: With the option that allows it.
        ServiceError: If no process can be started for it.
    """
    asked = recipe.evaluation.few_shot.tasks
    running = [
        name
        for name, suite in suites.items()
        if any(task.runs_code and (not asked or task.name in asked) for task in suite.infilling)
    ]
    if not running:
        return
    if not is_allowed:
        raise RecipeError(
            f"suite {running[0]} runs code that the model writes, in a sandbox: allow it by `ul2r evaluate RECIPE "
            "--allow-code-execution`"
        )
    check_confinement()


def _describe_left_out(
    suite: Suite, unavailable: Sequence[Unavailable], settings: FewShot
) -> dict[str, str]:
    left_out = {task.name: f"{task.dataset}: {task.reason}" for task in unavailable}
    if settings.tasks:
        names = [line.name for line in suite.lines]
        left_out |= {n: "not asked for" for n in names if n not in settings.tasks}
    return left_out


def _find_model(recipe: Recipe) -> tuple[Path, RunPaths, str]:
    """Return the folder of the model, the paths of what is known of it, and the digest of its weights."""
    name = recipe.evaluation.few_shot.model
    if name is not None:
        folder = resolve_model_folder(name)
        arm = PretrainedArm.from_folder(name, folder, recipe.storage)
        return folder, arm.paths, arm.digest
    if not recipe.paths.export.is_dir():
        raise CheckpointError(
            f"run {recipe.name!r} has no export at {recipe.paths.export}: run `ul2r export RECIPE` first"
        )
    return recipe.paths.export, recipe.paths, hash_export(recipe.paths.export)


def _load_model(recipe: Recipe, folder: Path, digest: str) -> Subject:
    device = "cuda" if recipe.launch.gpus_per_worker else "cpu"
    model = LanguageModel.load(folder, device)
    return Subject(model, read_document_start(folder, model.metadata), digest)


def _load_tasks(
    outcome: tuple[list[Task], list[Unavailable]], recipe: Recipe
) -> tuple[list[Task], list[Unavailable]]:
    """Return the outcome of `load_tasks`, unless tasks are missing that should not be."""
    tasks, unavailable = outcome
    if unavailable:
        message = describe_unavailable(unavailable, recipe.evaluation.data)
        if not tasks or not recipe.evaluation.few_shot.skip_missing:
            hint = "" if not tasks else "; evaluation.few_shot.skip_missing=true runs the others"
            raise CorpusError(f"{message}{hint}")
        logger.warning("left out: %s", message)
    return tasks, unavailable


def _record(
    store: TrackingStore,
    recipe: Recipe,
    result: SuiteResult,
    folder: Path,
    model_run: str | None,
) -> None:
    """Record a suite's results as a run of their own, which names the run of the model if there is one."""
    model = recipe.evaluation.few_shot.model or recipe.name
    run_id = store.continue_run(
        recipe.tracking.experiment,
        f"{model}-{result.suite}-{result.label}".replace("/", "-"),
        folder,
        tags={
            "ul2r.role": FEW_SHOT_ROLE,
            **({"ul2r.model_run": model_run} if model_run is not None else {}),
        },
        params={
            "model": model,
            "suite": result.suite,
            **{key: str(value) for key, value in result.form.items()},
            **{key: str(value) for key, value in result.settings.items()},
            "left_out": ", ".join(result.left_out) or "nothing",
        },
    )
    with store.end_on_error(run_id):
        store.log_summary(run_id, name_metrics(result))
        shown = read_first_items(folder / ITEMS_FILE, TABLE_ITEMS)
        columns = ("task", "item", "value", "target", "answer")
        store.log_table(run_id, {c: [row[c] for row in shown] for c in columns}, "items.json")
        store.log_artifact(run_id, folder / ITEMS_FILE)
    store.end_run(run_id, "FINISHED")


def name_metrics(result: SuiteResult) -> dict[str, float]:
    """Return all scores by their names in a record: eval/SUITE/TASK/METRIC."""
    metrics = {
        f"eval/{result.suite}/{task}/{metric}": value
        for task, values in result.all_metrics.items()
        for metric, value in values.items()
    }
    metrics = {name: value for name, value in metrics.items() if is_metric_name(name)}
    return {**metrics, **name_headlines(result)}


def name_headlines(result: SuiteResult) -> dict[str, float]:
    """Return the headline scores and their mean by their names in a record, with standard errors."""
    metrics = {}
    for line, score in result.scores.items():
        metrics[f"eval/{result.suite}/{line}/{result.metrics[line]}"] = score.mean
        metrics[f"eval/{result.suite}/{line}/{result.metrics[line]}_stderr"] = score.stderr
    mean = name_suite_mean(result.suite)
    metrics[mean] = result.mean.mean
    metrics[f"{mean}_stderr"] = result.mean.stderr
    return {name: value for name, value in metrics.items() if is_metric_name(name)}


def make_suite_table(result: SuiteResult, model: str) -> Table:
    """Return a suite's scores as a table for a terminal."""
    table = Table("task", title=f"{model}: {result.suite} ({result.label})")
    for heading in ("metric", "score", "± standard error", "items"):
        table.add_column(heading, justify="right")
    for line, score in result.scores.items():
        mean, error = score.format(3).split(" ± ")
        table.add_row(line, result.metrics[line], mean, error, str(score.count))
    mean, error = result.mean.format(3).split(" ± ")
    table.add_section()
    table.add_row("mean", "", mean, error, f"{result.mean.count} tasks")
    return table
