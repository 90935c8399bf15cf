"""Few-shot results of the arms of a comparison, side by side and paired."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path

from ul2r.config import Recipe
from ul2r.errors import RecipeError
from ul2r.evaluation.few_shot.items import ITEMS_FILE, RESULT_FILE, pool_headlines, read_headlines
from ul2r.evaluation.few_shot.paired import compare_items
from ul2r.evaluation.few_shot.result_table import (
    NamedDifference,
    NamedResult,
    summarize_results,
    tabulate_results,
)
from ul2r.evaluation.few_shot.suite_result import SuiteResult
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.filesystem import write_atomically
from ul2r.paths import RunPaths
from ul2r.tracking.export_digest import hash_export

logger = logging.getLogger(__name__)

FEW_SHOT_FILE = "few_shot.json"
TABLE_FILE = "few_shot.md"
SAME = ("seeds", "limit", "samples", "temperature")
"""Settings in which results that are compared agree."""


@dataclass(frozen=True)
class FewShotArm:
    """An arm of a comparison, and what its few-shot results must be of.

    Attributes:
        paths: Paths of what is known of the model.
        find_digest: Returns the digest of its weights; called only if there are results.
    """

    paths: RunPaths
    find_digest: Callable[[], str]


def describe_arm(recipe: Recipe, pretrained: PretrainedArm | None) -> FewShotArm:
    """Describe a run, or the model that is measured in its place."""
    if pretrained is not None:
        return FewShotArm(pretrained.paths, lambda: pretrained.digest)
    return FewShotArm(recipe.paths, cache(partial(hash_export, recipe.paths.export)))


@dataclass(frozen=True)
class FewShotComparison:
    """Few-shot results of a comparison's arms.

    Attributes:
        files: What was written of them.
        summary: Means and their differences as Markdown; None without results.
    """

    files: tuple[Path, ...] = ()
    summary: str | None = None


def write_few_shot_comparison(folder: Path, arms: Mapping[str, FewShotArm]) -> FewShotComparison:
    """Write the scores of all arms, and the paired differences of every two on every suite that both were run on.

    Results of other weights, as before more training, are left out with a warning; so are pairs of results with
    other seeds or another limit, which are of other items.

    Args:
        folder: Folder of the comparison.
        arms: The arms, base first.

    Raises:
        RecipeError: If two arms were run on other items of a task.
    """
    results = [found for role, arm in arms.items() for found in _find_results(role, arm)]
    differences = []
    for first, second in combinations(results, 2):
        if first.is_comparable(second):
            found = _compare(first, second)
            if found.differences:
                differences.append(found)

    columns = [NamedResult(found.name, found.result) for found in results]
    # Files of results that are there no more would be taken for these arms'.
    for name in (FEW_SHOT_FILE, TABLE_FILE):
        (folder / name).unlink(missing_ok=True)
    if not columns:
        return FewShotComparison()
    files = [folder / TABLE_FILE]
    write_atomically(files[0], tabulate_results(columns, differences) + "\n")
    if differences:
        files.append(folder / FEW_SHOT_FILE)
        entries = [asdict(found) for found in differences]
        write_atomically(files[1], json.dumps(entries, indent=2) + "\n")
    return FewShotComparison(tuple(files), summarize_results(columns, differences))


def _compare(first: _Found, second: _Found) -> NamedDifference:
    values, others = (
        pool_headlines(read_headlines(found.folder / ITEMS_FILE)) for found in (first, second)
    )
    try:
        differences = compare_items(values, others)
    except RecipeError as error:
        raise RecipeError(
            f"suite {first.result.suite}, {first.name} and {second.name}: {error}"
        ) from None
    return NamedDifference(
        first.result.suite, first.name, second.name, differences, first.result.pooling
    )


@dataclass(frozen=True)
class _Found:
    """A result on disk."""

    role: str
    folder: Path
    result: SuiteResult

    @property
    def name(self) -> str:
        return f"{self.role} ({self.folder.name})"

    def is_comparable(self, other: _Found) -> bool:
        """Return whether both are of the same suite with the same seeds, limit and samples."""
        return self.result.suite == other.result.suite and all(
            self.result.settings.get(key) == other.result.settings.get(key) for key in SAME
        )


def _find_results(role: str, arm: FewShotArm) -> Iterator[_Found]:
    """Yield the results of an arm's very weights."""
    for file in sorted(arm.paths.few_shot.glob(f"*/*/{RESULT_FILE}")):
        result = SuiteResult.read(file.parent)
        if result.model == arm.find_digest():
            yield _Found(role, file.parent, result)
        else:
            logger.warning(
                "%s: left out, since %s has other weights by now: run `ul2r evaluate --suite %s` again",
                file.parent,
                role,
                result.suite,
            )
