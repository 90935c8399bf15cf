"""Few-shot results that a run has, and suites that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ul2r.config import Recipe
from ul2r.evaluation.few_shot.items import RESULT_FILE
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.tracking.export_digest import hash_export
from ul2r.workflows.few_shot import run_suites

ITEM_SETTINGS = ("seeds", "limit", "tasks", "samples", "temperature")
"""Settings that say which items are run, and how often."""


def run_missing_suites(recipe: Recipe) -> None:
    """Run the recipe's suites that its export has no result of, in any form of the prompts.

    Raises:
        UserError: As `run_suites`.
    """
    missing = [
        suite
        for suite in recipe.evaluation.few_shot.suites
        if not list(find_results(recipe, suite))
    ]
    if missing:
        few_shot = recipe.evaluation.few_shot.model_copy(update={"suites": tuple(missing)})
        evaluation = recipe.evaluation.model_copy(update={"few_shot": few_shot})
        run_suites(recipe.model_copy(update={"evaluation": evaluation}))


def find_results(recipe: Recipe, suite: str) -> Iterator[tuple[Path, SuiteResult]]:
    """Yield the results of a suite that are of the run's export as it is, and of the recipe's items.

    A part of a suite, or other seeds, are other items; a form of the prompts is not.
    """
    settings = recipe.evaluation.few_shot.model_dump(mode="json", include=set(ITEM_SETTINGS))
    for file in sorted(recipe.paths.few_shot.glob(f"{Path(suite).stem}/*/{RESULT_FILE}")):
        result = SuiteResult.read(file.parent)
        is_same = all(value == settings[k] for k, value in result.settings.items() if k in settings)
        if is_same and result.model == hash_export(recipe.paths.export):
            yield file.parent, result
