"""A ladder: its plan, its runs, and what they show together."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.table import Table

from ul2r.config import Recipe, dump
from ul2r.config.gaps import GAPS_SUITE
from ul2r.config.ladder import Ladder
from ul2r.data.store.dataset import is_prepared, open_run_dataset
from ul2r.environment import has_ray
from ul2r.errors import LaunchError, RecipeError, ServiceError
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.stored_scores import load_scores
from ul2r.filesystem import write_atomically
from ul2r.launch.preflight import check_infilling, check_names, planned_vocabulary
from ul2r.model.flops import training_flops
from ul2r.model.sizing import check_memory, estimate_seconds
from ul2r.paths import TOKENIZER_FILE, StoragePaths
from ul2r.tracking.store import check_store
from ul2r.train.trial_build import check_buildable
from ul2r.workflows.base_change import is_base_current
from ul2r.workflows.dry_run import seen_keys_per_row, targets_per_row
from ul2r.workflows.few_shot import check_suites
from ul2r.workflows.ladder_plan import LadderRun, plan_ladder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LadderResult:
    """A ladder whose runs have ended.

    Attributes:
        folder: Folder of its files.
        verdict: Sentences on what its runs save.
        failed: A line for each run that failed.
    """

    folder: Path
    verdict: list[str]
    failed: list[str]


def run_ladder(ladder: Ladder) -> LadderResult:
    """Complete the runs of a ladder that are not finished, and write what they show.

    A run that fails ends those that continue it, no other; what the others show is written all the same.

    Raises:
        UserError: If a recipe is wrong, the tracking server or Ray fails, or no base could be trained.
    """
    if not has_ray():
        raise ServiceError(
            "ul2r scaling starts its runs as tasks of Ray, which is not installed: install ray"
        )
    from ul2r.workflows.ladder_results import record_results, write_results
    from ul2r.workflows.ladder_run import complete_runs, list_failures
    from ul2r.workflows.prepare import prepare_store

    # What can refuse comes first.
    runs = plan_ladder(ladder)
    _check_runs(ladder, runs)
    store = check_store(ladder.tracking.uri)
    store.check_experiment(ladder.tracking.experiment)
    prepare_store(runs[0].recipe)

    finished = find_finished(runs)
    write_recipes(ladder, runs)
    logger.info("%s: %d runs, %d of them finished", ladder.name, len(runs), len(finished))
    outcome = complete_runs(runs, finished)
    failed = list(list_failures(outcome))
    if not outcome.finished:
        raise LaunchError(f"ladder {ladder.name!r}: all runs failed: {failed[0]}")
    folder = ladder_folder(ladder)
    verdict, files = write_results(ladder, runs, outcome.finished, folder)
    suites = runs[0].recipe.evaluation.few_shot.suites
    record_results(ladder, store, folder, files, suites)
    return LadderResult(folder, verdict, failed)


def _check_runs(ladder: Ladder, runs: Sequence[LadderRun]) -> None:
    """Check of each run what can be checked before its base exists; build the model of each size once."""
    _check_metrics(ladder, runs[0].recipe)
    _check_suites(ladder, runs)
    built = set()
    for run in runs:
        check_names(run.recipe)
        check_infilling(run.recipe)
        check_memory(run.recipe, planned_vocabulary(run.recipe))
        if run.size not in built:
            built.add(run.size)
            check_buildable(run.recipe)


def _check_suites(ladder: Ladder, runs: Sequence[LadderRun]) -> None:
    """Refuse suites that cannot be run, and gaps, which no figure of a ladder shows.

    Raises:
        UserError: If there are some.
    """
    for run in runs:
        if GAPS_SUITE in run.recipe.evaluation.few_shot.suites:
            recipes = recipes_folder(ladder)
            raise RecipeError(
                f"evaluation.few_shot.suites: a ladder does not measure {GAPS_SUITE}: leave it out, and run `ul2r "
                f"evaluate {recipes / run.name}.yaml --suite {GAPS_SUITE}` on each run when it is finished"
            )
    # Once for all runs that are evaluated alike, which are all unless an arm or a size has settings of its own.
    for recipe in {run.recipe.evaluation: run.recipe for run in runs}.values():
        if recipe.evaluation.few_shot.suites:
            check_suites(recipe)


def _check_metrics(ladder: Ladder, recipe: Recipe) -> None:
    """Refuse metrics that are not measured.

    Raises:
        RecipeError: With the nearest name.
    """
    names = [metric.name for metric in list_metrics(recipe.evaluation)]
    for name in ladder.metrics:
        if name not in names:
            (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0) or names[:1]
            raise RecipeError(f"metrics: {name!r} is not measured: did you mean {nearest!r}?")


def find_finished(runs: Sequence[LadderRun]) -> set[str]:
    """Return the names of the runs that are trained and measured with these very recipes, as is what they continue.

    A run whose base was trained again is none of them.

    Args:
        runs: All runs of a ladder; each comes after the one that it continues.
    """
    finished: set[str] = set()
    for run in runs:
        has_base = run.base is None or run.base in finished
        if (
            has_base
            and _is_completed(run.recipe)
            and _is_measured(run.recipe)
            and is_base_current(run.recipe)
        ):
            finished.add(run.name)
    return finished


def _is_completed(recipe: Recipe) -> bool:
    # Not the recipes that the ladder writes out, which it does before it trains them.
    file = recipe.paths.completed_recipe
    return file.is_file() and file.read_text(encoding="utf-8") == dump(recipe)


def _is_measured(recipe: Recipe) -> bool:
    if not (recipe.paths.export / TOKENIZER_FILE).is_file():
        return False
    return load_scores(recipe, open_run_dataset(recipe)) is not None


def recipes_folder(ladder: Ladder) -> Path:
    """Return the folder of the recipes of a ladder's runs."""
    return ladder_folder(ladder) / "recipes"


def ladder_folder(ladder: Ladder) -> Path:
    """Return the folder of a ladder's files."""
    return StoragePaths(ladder.storage).ladder(ladder.name)


def write_recipes(ladder: Ladder, runs: Sequence[LadderRun]) -> None:
    """Write the recipe of each run, which `ul2r train` takes like any other."""
    folder = recipes_folder(ladder)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_atomically(folder / f"{run.name}.yaml", dump(run.recipe))


def estimate_flops(runs: Sequence[LadderRun]) -> dict[str, float]:
    """Return the expected training FLOPs of each run's own steps, by name."""

    @cache
    def per_row(size: str, arm: str) -> tuple[float, float]:
        # The same for all seeds and budgets, but for the noise of drawn lengths.
        recipe = next(run.recipe for run in runs if (run.size, run.arm) == (size, arm))
        return seen_keys_per_row(recipe), targets_per_row(recipe)

    flops = {}
    for run in runs:
        recipe = run.recipe
        rows = recipe.training.steps * recipe.training.global_batch_size
        keys, targets = per_row(run.size, run.arm)
        flops[run.name] = training_flops(
            recipe.model,
            _vocabulary_size(recipe),
            rows * recipe.objective.sequence_length,
            rows * keys,
            rows * targets,
        )
    return flops


def _vocabulary_size(recipe: Recipe) -> int:
    if is_prepared(recipe):
        return open_run_dataset(recipe).vocabulary.size
    return planned_vocabulary(recipe)


def describe_plan(ladder: Ladder) -> tuple[Table, str]:
    """Check a ladder's recipes; return a table of its runs, a line for those of several seeds, and a summary.

    Raises:
        UserError: If a recipe is wrong.
    """
    runs = plan_ladder(ladder)
    _check_runs(ladder, runs)
    flops = estimate_flops(runs)
    finished = find_finished(runs) if is_prepared(runs[0].recipe) else set()
    table = Table(title=f"{ladder.name}: {len(runs)} runs, nothing was started")
    for heading in ("size", "budget", "arm", "continues", "steps", "tokens", "FLOPs", "time"):
        table.add_column(heading, justify="left" if heading in {"size", "arm"} else "right")
    table.add_column("finished", justify="right")

    for run in runs:
        if run.seed != ladder.seeds[0]:
            continue
        recipe = run.recipe
        seconds = estimate_seconds(recipe, flops[run.name])
        same = [
            other.name
            for other in runs
            if (other.size, other.budget, other.arm) == (run.size, run.budget, run.arm)
        ]
        table.add_row(
            run.size,
            f"{run.budget:,}",
            run.arm,
            run.base or "",
            f"{recipe.training.steps:,}",
            f"{recipe.training.steps * recipe.tokens_per_step:,}",
            f"{flops[run.name]:.3g}",
            "unknown" if seconds is None else f"{seconds / 60:.1f} min",
            f"{len(finished.intersection(same))} of {len(same)}",
        )
    return table, _summarize(runs, flops, finished)


def _summarize(runs: Sequence[LadderRun], flops: dict[str, float], finished: set[str]) -> str:
    left = [run for run in runs if run.name not in finished]
    seconds = [estimate_seconds(run.recipe, flops[run.name]) for run in left]
    total = sum(flops.values())
    lines = [
        f"{total:.3g} training FLOPs in all, {sum(flops[run.name] for run in left):.3g} of them to come; "
        "bases are trained once for all arms"
    ]
    if None in seconds:
        lines.append("time: unknown on CPUs; set launch.device_peak_tflops in the arms' recipes")
    else:
        hours = sum(s for s in seconds if s is not None) / 3600
        lines.append(
            f"time: {hours:.2f} hours of training one after the other, less as several run at once; starts, exports "
            "and evaluation come on top"
        )
    return "\n".join(lines)
