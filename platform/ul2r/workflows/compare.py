"""A comparison from recipes to table and picture, in files and in MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul2r.config import Comparison, Recipe, load
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import RecipeError
from ul2r.evaluation.comparison import ROLES, Arm, Role, as_markdown, as_tree, check_comparable
from ul2r.evaluation.curves import load_curve
from ul2r.evaluation.evaluate import Metric, export_folder, metrics
from ul2r.evaluation.plot import draw
from ul2r.inference import read_export_metadata
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.tracking.mlflow import (
    check_server,
    continue_run,
    end_run,
    find_run,
    log_summary,
    require_run,
)
from ul2r.workflows.evaluate import evaluate_runs, log_scores

FILES = ("table.md", "table.json", "comparison.png")


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Attributes:
        folder: Where its files are.
        arms: The runs, base first.
        metrics: What the table shows.
    """

    folder: Path
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]


def compare(comparison: Comparison) -> Compared:
    """Measure the runs that were not measured yet, and set them side by side.

    Table and picture are written to the comparison's folder and to an MLflow run of its name. Where nothing has
    changed since they were, nothing is done.

    Raises:
        UserError: If recipes cannot be compared, an export is missing, or the tracking server fails.
    """
    recipes = _recipes(comparison)
    check_comparable(recipes)
    _check_experiment(comparison, recipes)
    uri = check_server(comparison.tracking.uri)
    first = next(iter(recipes.values()))
    dataset = open_dataset(first.storage_paths.store)
    runs = {role: require_run(uri, recipe) for role, recipe in recipes.items()}
    exports = [export_folder(recipe, dataset) for recipe in recipes.values()]
    scores = evaluate_runs(list(recipes.values()), dataset)
    for recipe, measured in zip(recipes.values(), scores, strict=True):
        log_scores(uri, recipe, dataset, measured)
    arms = tuple(
        Arm(role, read_export_metadata(folder), measured)
        for role, folder, measured in zip(recipes, exports, scores, strict=True)
    )
    folder = comparison.storage / "comparisons" / comparison.name
    compared = Compared(folder, arms, metrics(first.evaluation))
    if not _is_current(compared, comparison.name, runs) or find_run(uri, folder) is None:
        _write(compared, comparison.name, uri, runs, [d.name for d in first.evaluation.mixture])
        _log(compared, comparison, uri)
    return compared


def _recipes(comparison: Comparison) -> dict[Role, Recipe]:
    storage = f"storage={json.dumps(str(comparison.storage))}"
    return {
        role: load(comparison.recipes[role], [storage], Recipe, fill_model_from_base)
        for role in ROLES
        if role in comparison.recipes
    }


def _check_experiment(comparison: Comparison, recipes: Mapping[Role, Recipe]) -> None:
    for role, recipe in recipes.items():
        ours, theirs = comparison.tracking.experiment, recipe.tracking.experiment
        if ours != theirs:
            raise RecipeError(
                f"tracking.experiment: comparison has {ours!r}, {role} has {theirs!r}: make them equal, so that MLflow "
                "shows all runs together"
            )


def _tree(compared: Compared, name: str, runs: Mapping[Role, str]) -> dict[str, Any]:
    return {**as_tree(name, compared.arms, compared.metrics), "mlflow_runs": dict(runs)}


def _is_current(compared: Compared, name: str, runs: Mapping[Role, str]) -> bool:
    """Whether all files are there, with these scores of these runs."""
    if not all((compared.folder / file).is_file() for file in FILES):
        return False
    written = json.loads((compared.folder / "table.json").read_text(encoding="utf-8"))
    return bool(written == json.loads(json.dumps(_tree(compared, name, runs))))


def _write(
    compared: Compared, name: str, uri: str, runs: Mapping[Role, str], denoisers: Sequence[str]
) -> None:
    """Write the files; table.json last, since it says what the others show."""
    compared.folder.mkdir(parents=True, exist_ok=True)
    curves = {role: load_curve(uri, run_id, denoisers) for role, run_id in runs.items()}
    draw(compared.folder / "comparison.png", name, compared.arms, curves, denoisers)
    _put(compared.folder / "table.md", as_markdown(name, compared.arms, compared.metrics))
    tree = _tree(compared, name, runs)
    _put(compared.folder / "table.json", json.dumps(tree, indent=2) + "\n")


def _put(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _log(compared: Compared, comparison: Comparison, uri: str) -> None:
    """Keep the files in an MLflow run of the comparison's own, the same each time."""
    run_id = continue_run(
        uri,
        comparison.tracking.experiment,
        comparison.name,
        compared.folder,
        tags={"ul2r.role": "comparison"},
        params={arm.role: arm.metadata.run for arm in compared.arms},
    )
    log_summary(uri, run_id, {}, [compared.folder / file for file in FILES])
    end_run(uri, run_id, "FINISHED")
