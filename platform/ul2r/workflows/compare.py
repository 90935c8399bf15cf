"""A comparison from recipes to table and plot, in files and in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ul2r.config import Comparison, HuggingFaceBase, Recipe, dump, load
from ul2r.config.recorded_recipe import read_recorded_recipe
from ul2r.data.store.dataset import open_run_dataset
from ul2r.errors import RecipeError
from ul2r.evaluation.comparison import (
    ROLES,
    Arm,
    Role,
    check_comparable,
    find_origins,
    find_parents,
    warn_of_precisions,
)
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.curves import load_loss_curve
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.plot import plot_comparison
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.report import Picture
from ul2r.evaluation.scores import Scores
from ul2r.evaluation.stored_scores import find_export
from ul2r.evaluation.verdict import describe_verdict
from ul2r.filesystem import write_atomically
from ul2r.inference import ExportMetadata, read_export_metadata
from ul2r.inference.pretrained import read_pretrained_metadata
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.paths import StoragePaths
from ul2r.tracking.names import check_denoiser_names
from ul2r.tracking.provenance import NOTE_TAG
from ul2r.tracking.roles import COMPARISON_ROLE
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.workflows.base_change import has_other_base
from ul2r.workflows.comparison_report import REPORT_FILE, write_report
from ul2r.workflows.evaluate import (
    INFILLED_FILE,
    evaluate_arms,
    log_scores,
    tabulate_infilled,
)
from ul2r.workflows.few_shot_comparison import describe_arm, write_few_shot_comparison
from ul2r.workflows.gap_comparison import GAPS_PLOT_FILE, write_gap_comparison
from ul2r.workflows.pretrained_arms import (
    prepare_pretrained_arm,
    record_pretrained_arm,
    resolve_hub_model,
)

logger = logging.getLogger(__name__)

TABLE_FILE = "table.md"
JSON_FILE = "table.json"
PLOT_FILE = "comparison.png"
PLOT_CAPTION = "Losses by denoiser, losses by training compute, and infilling."
GAPS_CAPTION = (
    "Held-out gaps, with the left side alone in sight and with both; bars are one standard error."
)
FEW_SHOT_HEADING = "Few-shot and infilling suites"
FILES = (TABLE_FILE, JSON_FILE, PLOT_FILE)


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison.

    Attributes:
        folder: Folder of its files.
        table: Scores of the runs, base first.
        few_shot: Means of suites as Markdown; None if the runs have no results of any.
    """

    folder: Path
    table: ComparisonTable
    few_shot: str | None = None


def compare(comparison: Comparison) -> ComparisonResult:
    """Measure the runs that have no scores yet, and write the comparison of all.

    Table, plot and report are written to the comparison's folder and to an MLflow run of its name, unless those of
    these very scores are there.

    Raises:
        UserError: If the recipes cannot be compared, an export is missing, or the tracking server fails.
    """
    # Everything that can refuse comes first: measuring takes minutes.
    recipes, models = _load_entries(comparison)
    check_comparable(recipes, models)
    _check_experiment(comparison, recipes)
    trained = {role: read_recorded_recipe(recipe) for role, recipe in recipes.items()}
    warn_of_precisions(trained)
    for recipe in recipes.values():
        check_denoiser_names(recipe.evaluation.mixture, "evaluation.mixture")
    store = check_store(comparison.tracking.uri)
    store.check_experiment(comparison.tracking.experiment)

    any_recipe = next(iter(recipes.values()))  # they agree in storage and evaluation
    dataset = open_run_dataset(any_recipe)
    run_ids = {role: store.require_run(recipe) for role, recipe in recipes.items()}
    metadata = {
        role: read_export_metadata(find_export(recipe, dataset)) for role, recipe in recipes.items()
    }
    pretrained: dict[Role, PretrainedArm] = {}
    for role, model in models.items():
        pretrained[role] = prepare_pretrained_arm(role, model, any_recipe, dataset)
        metadata[role] = read_pretrained_metadata(pretrained[role].model_folder, dataset.vocabulary)

    roles = _sort_columns(comparison)
    arms = [(recipes.get(role, any_recipe), pretrained.get(role)) for role in roles]
    scores = dict(zip(roles, evaluate_arms(arms, dataset), strict=True))
    # Scores go to each run as well, as `ul2r evaluate` does: a run may be compared without having been evaluated.
    for role, recipe in recipes.items():
        log_scores(store, recipe, dataset, scores[role])
    metrics = list_metrics(any_recipe.evaluation)
    for role, arm in pretrained.items():
        run_ids[role] = record_pretrained_arm(
            store, comparison.tracking.experiment, role, arm, scores[role], metrics=metrics
        )

    table_arms = _make_arms(recipes, models, metadata, scores)
    table = ComparisonTable(name=comparison.name, arms=table_arms, metrics=metrics)
    run_ids = {role: run_ids[role] for role in roles}
    result = ComparisonResult(StoragePaths(comparison.storage).comparison(comparison.name), table)
    # The server is asked too: it may be another one than that of the last comparison.
    is_new = not _is_current(result, run_ids) or store.find_run(result.folder) is None
    if is_new:
        denoisers = [denoiser.name for denoiser in any_recipe.evaluation.mixture]
        _write_files(result, store, run_ids, denoisers)
        _log_files(result, comparison, store, run_ids.values())

    described = {role: describe_arm(*arm) for role, arm in zip(roles, arms, strict=True)}
    few_shot = write_few_shot_comparison(result.folder, described)
    gaps = write_gap_comparison(
        result.folder, comparison.name, described, dataset.manifest.fingerprint
    )
    run_id = store.find_run(result.folder)
    differences = next((file for file in few_shot.files if file.suffix == ".json"), None)
    pictures = [Picture(PLOT_CAPTION, result.folder / PLOT_FILE)]
    pictures += [Picture(GAPS_CAPTION, file) for file in gaps if file.name == GAPS_PLOT_FILE]
    report = write_report(
        result.folder, result.table, pictures, differences, _list_settings(trained)
    )
    if run_id is not None:
        # Of a report that is there already, the run has a copy, unless the run is new.
        written = [result.folder / REPORT_FILE] if report is not None or is_new else []
        for file in (*few_shot.files, *gaps, *written):
            store.log_artifact(run_id, file)
        if few_shot.summary is not None:
            store.note_run(run_id, FEW_SHOT_HEADING, few_shot.summary)
    return replace(result, few_shot=few_shot.summary)


def _make_arms(
    recipes: Mapping[Role, Recipe],
    models: Mapping[Role, HuggingFaceBase],
    metadata: Mapping[Role, ExportMetadata],
    scores: Mapping[Role, Scores],
) -> tuple[Arm, ...]:
    """Return the table's columns, in the order of the scores."""
    origins = find_origins(recipes, models)
    changed = _find_changed(recipes, models, metadata)
    return tuple(
        Arm(role, metadata[role], score, origins[role], role in changed)
        for role, score in scores.items()
    )


def _find_changed(
    recipes: Mapping[Role, Recipe],
    models: Mapping[Role, HuggingFaceBase],
    metadata: Mapping[Role, ExportMetadata],
) -> set[Role]:
    """Return the columns that began with other weights than those that the column of their base is of; warn of each."""
    changed = set()
    for role, parent in find_parents(recipes, models).items():
        if has_other_base(recipes[role], metadata[parent]):
            changed.add(role)
            logger.warning(
                "%s began with other weights than those of %s in this comparison, which was trained again, or further, "
                "since: train it again",
                role,
                parent,
            )
    return changed


def _list_settings(recipes: Mapping[Role, Recipe]) -> dict[Role, str]:
    """Return the text of each recipe; models that are measured as they are have none."""
    return {f"{role}: {recipe.name}": dump(recipe) for role, recipe in recipes.items()}


def _sort_columns(comparison: Comparison) -> list[Role]:
    """Return the names of the columns: the known roles in their order, then the others as they are in the file."""
    known = [role for role in ROLES if role in comparison.recipes]
    return [*known, *(role for role in comparison.recipes if role not in ROLES)]


def _load_entries(
    comparison: Comparison,
) -> tuple[dict[Role, Recipe], dict[Role, HuggingFaceBase]]:
    """Return the recipes and the pretrained models of a comparison, by column."""
    # The comparison's storage replaces the recipes' own, so that --set storage=... moves all of them.
    storage = f"storage={json.dumps(str(comparison.storage))}"

    recipes: dict[Role, Recipe] = {}
    models: dict[Role, HuggingFaceBase] = {}
    for role in _sort_columns(comparison):
        entry = comparison.recipes[role]
        if isinstance(entry, HuggingFaceBase):
            models[role] = resolve_hub_model(entry)
        else:
            recipe = load(entry, [storage], Recipe, fill_model_from_base)
            # So that a folder is the same however a recipe spells it.
            base = recipe.base
            if isinstance(base, HuggingFaceBase):
                recipe = recipe.model_copy(update={"base": resolve_hub_model(base)})
            recipes[role] = recipe
    return recipes, models


def _check_experiment(comparison: Comparison, recipes: Mapping[Role, Recipe]) -> None:
    """Refuse runs of another MLflow experiment than the comparison's.

    Raises:
        RecipeError: If one of them is.
    """
    for role, recipe in recipes.items():
        ours = comparison.tracking.experiment
        theirs = recipe.tracking.experiment
        if ours != theirs:
            raise RecipeError(
                f"tracking.experiment: the comparison has {ours!r}, {role} has {theirs!r}: set both to the same, so "
                "that MLflow shows all runs together"
            )


def _as_json(result: ComparisonResult, run_ids: Mapping[Role, str]) -> dict[str, Any]:
    return {
        **result.table.to_dict(),
        "verdict": describe_verdict(result.table),
        "mlflow_runs": dict(run_ids),
    }


def _is_current(result: ComparisonResult, run_ids: Mapping[Role, str]) -> bool:
    """Return whether all files exist and show these scores of these runs."""
    if not all((result.folder / file).is_file() for file in FILES):
        return False

    written = json.loads((result.folder / JSON_FILE).read_text(encoding="utf-8"))
    # Through JSON and back, which turns tuples into lists.
    return bool(written == json.loads(json.dumps(_as_json(result, run_ids))))


def _write_files(
    result: ComparisonResult,
    store: TrackingStore,
    run_ids: Mapping[Role, str],
    denoisers: Sequence[str],
) -> None:
    result.folder.mkdir(parents=True, exist_ok=True)

    # Curves come from the runs' records and are no part of `_is_current`: a finished run's do not change.
    curves = {role: load_loss_curve(store, run_id, denoisers) for role, run_id in run_ids.items()}
    plot_comparison(result.folder / PLOT_FILE, result.table, curves, denoisers)
    write_atomically(result.folder / TABLE_FILE, result.table.to_markdown())
    # Last, since `_is_current` takes it for a description of the other two.
    tree = _as_json(result, run_ids)
    write_atomically(result.folder / JSON_FILE, json.dumps(tree, indent=2) + "\n")


def _describe(table: ComparisonTable) -> str:
    """Return what a comparison shows as Markdown without headings: verdict, table, and how to read it."""
    # The page of the table begins with a heading.
    page = table.to_markdown().partition("\n\n")[2]
    return "\n\n".join([*describe_verdict(table), page])


def _log_files(
    result: ComparisonResult,
    comparison: Comparison,
    store: TrackingStore,
    compared: Iterable[str],
) -> None:
    """Log the files to the comparison's own run, the same one each time, and the verdict to the compared ones."""
    note = _describe(result.table)
    run_id = store.continue_run(
        comparison.tracking.experiment,
        comparison.name,
        result.folder,
        # The description is renewed with the scores.
        tags={"ul2r.role": COMPARISON_ROLE, NOTE_TAG: note},
        params={arm.role: arm.metadata.run for arm in result.table.arms},
    )
    with store.end_on_error(run_id):
        # No metrics: they belong to the compared runs.
        store.log_summary(run_id, {}, [result.folder / file for file in FILES])
        scores = {arm.role: arm.scores for arm in result.table.arms}
        # Scores of earlier versions were stored without them.
        if all(arm_scores.infilled for arm_scores in scores.values()):
            store.log_table(run_id, tabulate_infilled(scores), INFILLED_FILE)
        heading = f"Comparison {comparison.name}"
        store.note_experiment(comparison.tracking.experiment, heading, note)
        verdict = "\n\n".join(describe_verdict(result.table))
        for compared_id in compared:
            store.note_run(compared_id, heading, verdict)
    store.end_run(run_id, "FINISHED")
