"""Gaps of held-out text measured by a run's export, or a model in its place, and their record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ul2r.config import Recipe
from ul2r.config.gaps import GAPS_SUITE, fit_gaps
from ul2r.console import show_progress
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.evaluation.gaps import (
    GapGroup,
    GapScores,
    count_steps,
    find_readings,
    measure_gaps,
    select_gaps,
)
from ul2r.evaluation.gaps.plot import plot_gaps
from ul2r.evaluation.gaps.result import ITEMS_FILE, GapConditions, load_gaps, save_gaps
from ul2r.evaluation.pretrained import PretrainedArm
from ul2r.evaluation.stored_scores import find_export
from ul2r.inference import LanguageModel
from ul2r.inference.pretrained import PretrainedModel
from ul2r.model.huggingface.safetensors_reader import resolve_model_folder
from ul2r.paths import RunPaths
from ul2r.tracking.export_digest import hash_export
from ul2r.tracking.names import is_metric_name
from ul2r.tracking.roles import GAPS_ROLE
from ul2r.tracking.store import TrackingStore, check_store

logger = logging.getLogger(__name__)

PLOT_FILE = "gaps.png"
TABLE_ITEMS = 200
"""Gaps in the table of a record; all are in items.parquet."""


@dataclass(frozen=True)
class MeasuredGaps:
    """A model's scores of gaps.

    Attributes:
        name: Name of the model.
        folder: Folder of the files.
        scores: Each group in each reading.
        left_out: Names of the groups that do not fit the rows of training.
    """

    name: str
    folder: Path
    scores: Sequence[GapScores]
    left_out: Sequence[str]


def measure_run_gaps(recipe: Recipe) -> MeasuredGaps:
    """Measure the gaps of `evaluation.gaps`, unless these very scores are there, and record them.

    The model is the run's export, or `evaluation.few_shot.model`.

    Raises:
        UserError: If the export or model is missing, the gaps do not fit, or the tracking server fails.
    """
    dataset = open_run_dataset(recipe)
    store = check_store(recipe.tracking.uri)
    store.check_experiment(recipe.tracking.experiment)
    settings = recipe.evaluation.gaps
    max_length = recipe.objective.slot_length + 1
    fitted = fit_gaps(settings, max_length)
    if fitted.left_out:
        logger.warning(
            "gaps %s are left out: a slot of training has %d tokens",
            ", ".join(fitted.left_out),
            max_length,
        )
    groups = select_gaps(dataset, settings, max_length)
    model, paths, digest = _load_model(recipe, dataset)
    conditions = GapConditions(
        model=digest,
        readings=find_readings(model),
        token_store=dataset.manifest.fingerprint,
        settings=settings.model_dump(mode="json"),
        max_length=max_length,
    )

    measured = load_gaps(paths.gaps, conditions)
    if measured is None:
        measured = _measure(model, groups, generate=settings.generate)
        save_gaps(paths.gaps, measured, conditions, fitted.left_out)
    name = recipe.evaluation.few_shot.model or recipe.name
    result = MeasuredGaps(name, paths.gaps, measured, fitted.left_out)
    plot_gaps(paths.gaps / PLOT_FILE, f"{name}: held-out gaps", {name: measured})
    _record(store, recipe, result, store.find_run(paths.folder))
    return result


def _measure(
    model: LanguageModel, groups: tuple[GapGroup, ...], *, generate: bool
) -> list[GapScores]:
    """Return the scores of all groups and readings, with a progress bar of gaps."""
    done = 0
    with show_progress(
        "gaps", count_steps(groups, find_readings(model), generate=generate), "gaps"
    ) as bar:

        def advance(num_gaps: int) -> None:
            nonlocal done
            done += num_gaps
            bar.update(done)

        advance(0)
        return list(measure_gaps(model, groups, generate=generate, on_progress=advance))


def _load_model(recipe: Recipe, dataset: TokenDataset) -> tuple[LanguageModel, RunPaths, str]:
    """Return the model, the paths of what is known of it, and the digest of its weights."""
    device = "cuda" if recipe.launch.gpus_per_worker else "cpu"
    name = recipe.evaluation.few_shot.model
    if name is None:
        folder = find_export(recipe, dataset)
        return LanguageModel.load(folder, device), recipe.paths, hash_export(folder)

    folder = resolve_model_folder(name)
    arm = PretrainedArm.from_folder(name, folder, recipe.storage)
    model = PretrainedModel.load_with_vocabulary(
        folder, dataset.vocabulary, dataset.tokenizer_file, device
    )
    return model, arm.paths, arm.digest


def _record(
    store: TrackingStore, recipe: Recipe, measured: MeasuredGaps, model_run: str | None
) -> None:
    """Record scores as a run of their own, which names the run of the model if there is one."""
    settings = recipe.evaluation.gaps.model_dump(mode="json")
    run_id = store.continue_run(
        recipe.tracking.experiment,
        f"{measured.name}-{GAPS_SUITE}".replace("/", "-"),
        measured.folder,
        tags={
            "ul2r.role": GAPS_ROLE,
            **({"ul2r.model_run": model_run} if model_run is not None else {}),
        },
        params={
            "model": measured.name,
            "suite": GAPS_SUITE,
            **{key: str(value) for key, value in settings.items()},
            "left_out": ", ".join(measured.left_out) or "nothing",
        },
    )
    with store.end_on_error(run_id):
        store.log_summary(run_id, name_metrics(measured.scores))
        store.log_table(run_id, tabulate_items(measured.scores), "items.json")
        for file in (ITEMS_FILE, PLOT_FILE):
            store.log_artifact(run_id, measured.folder / file)
    store.end_run(run_id, "FINISHED")


def name_metrics(measured: Sequence[GapScores]) -> dict[str, float]:
    """Return means and errors by their names in a record: eval/gaps/8x1/both/loss."""
    metrics: dict[str, float] = {}
    for scores in measured:
        for metric, score in scores.summarize().items():
            name = f"eval/{GAPS_SUITE}/{scores.name}/{scores.reading}/{metric}"
            metrics |= {name: score.mean, f"{name}_stderr": score.stderr}
    return {name: value for name, value in metrics.items() if is_metric_name(name)}


def tabulate_items(measured: Sequence[GapScores]) -> dict[str, list[object]]:
    """Return the first gaps of each group, and what was written into them, by column."""
    table: dict[str, list[object]] = {
        key: [] for key in ("group", "reading", "text", "gap", "target", "answer", "loss")
    }
    kept = max(1, TABLE_ITEMS // max(len(measured), 1))
    for scores in measured:
        places = [(t, g) for t in range(len(scores.hashes)) for g in range(scores.slots)]
        for text, gap in places[:kept]:
            answer = scores.written.answers[text][gap] if scores.written is not None else ""
            loss = float(scores.losses[text, gap].mean())
            target = scores.targets[text][gap]
            row = (scores.name, scores.reading, text, gap, target, answer, loss)
            for column, value in zip(table.values(), row, strict=True):
                column.append(value)
    return table


def make_gap_table(measured: MeasuredGaps) -> Table:
    """Return the main scores as a table for a terminal."""
    table = Table("gaps", "reading", title=f"{measured.name}: held-out gaps")
    columns = {
        "loss": "loss (nats/token)",
        "loss_at/1": "loss of the 1st token",
        "first_token_accuracy": "1st token right",
        "exact_match": "exact match",
        "edit_similarity": "edit similarity",
    }
    for heading in (*columns.values(), "texts"):
        table.add_column(heading, justify="right")
    for scores in measured.scores:
        found = scores.summarize()
        cells = [found[metric].format(3) if metric in found else "" for metric in columns]
        table.add_row(scores.name, scores.reading, *cells, str(len(scores.hashes)))
    return table
