"""Few-shot results that a run has, and suites that it lacks."""

from __future__ import annotations

from pathlib import Path

from ul2r.config import Recipe
from ul2r.evaluation.few_shot.infill_prompts import resolve_infilling
from ul2r.evaluation.few_shot.items import RESULT_FILE
from ul2r.evaluation.few_shot.prompting import resolve_prompting
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.inference import read_export_metadata
from ul2r.tracking.export_digest import hash_export
from ul2r.workflows.few_shot import run_suites

ITEM_SETTINGS = ("seeds", "limit", "tasks", "samples", "temperature")
"""Settings that say which items are run, and how often."""


def run_missing_suites(recipe: Recipe) -> None:
    """Run the recipe's suites that its export has no result of.

    Raises:
        UserError: As `run_suites`.
    """
    suites = recipe.evaluation.few_shot.suites
    missing = [suite for suite in suites if find_result(recipe, suite) is None]
    if missing:
        few_shot = recipe.evaluation.few_shot.model_copy(update={"suites": tuple(missing)})
        evaluation = recipe.evaluation.model_copy(update={"few_shot": few_shot})
        run_suites(recipe.model_copy(update={"evaluation": evaluation}))


def find_result(recipe: Recipe, suite: str) -> tuple[Path, SuiteResult] | None:
    """Return the result of a suite that `run_suites` would write, and its folder; None if there is none.

    It is of the export as it is, of the recipe's items and in its form of the prompts: a part of a suite, other seeds
    or another mode are results of their own.
    """
    settings = recipe.evaluation.few_shot
    items = settings.model_dump(mode="json", include=set(ITEM_SETTINGS))
    metadata = read_export_metadata(recipe.paths.export)
    for file in sorted(recipe.paths.few_shot.glob(f"{Path(suite).stem}/*/{RESULT_FILE}")):
        result = SuiteResult.read(file.parent)
        resolve = resolve_infilling if "reading" in result.form else resolve_prompting
        wanted = resolve(settings, metadata)
        is_same = all(items.get(k, v) == v for k, v in result.settings.items()) and all(
            result.form[key] == value for key, value in wanted.items()
        )
        if is_same and result.model == hash_export(recipe.paths.export):
            return file.parent, result
    return None
