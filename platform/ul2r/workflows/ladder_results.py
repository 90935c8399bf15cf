"""Results of a ladder's finished runs: points, savings, figures, tables and a report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ul2r.config import dump
from ul2r.config.ladder import BASE, Ladder
from ul2r.data.store.dataset import open_run_dataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.few_shot.chance import find_chance
from ul2r.evaluation.few_shot.items import ITEMS_FILE, read_items
from ul2r.evaluation.measure import list_metrics
from ul2r.evaluation.report import Example, Picture, Report, pair_examples, render_report
from ul2r.evaluation.scaling.figures import plot_emergence, plot_scaling
from ul2r.evaluation.scaling.points import (
    Axis,
    ScalingPoint,
    compute_savings,
    list_arms,
    list_sizes,
    pool_seeds,
)
from ul2r.evaluation.scaling.tables import (
    VERDICT_NOTE,
    describe_savings,
    tabulate_emergence,
    tabulate_savings,
    tabulate_scores,
    to_markdown,
)
from ul2r.evaluation.scores import InfilledText, Score
from ul2r.evaluation.stored_scores import find_export, load_scores
from ul2r.filesystem import write_atomically
from ul2r.inference import read_export_metadata
from ul2r.model.flops import num_parameters
from ul2r.tracking.names import name_evaluation, name_suite_mean
from ul2r.tracking.roles import LADDER_ROLE
from ul2r.tracking.store import TrackingStore
from ul2r.workflows.few_shot_results import find_result
from ul2r.workflows.ladder_plan import LadderRun

POINTS_FILE = "points.json"
TABLE_FILE = "table.md"
SCALING_FILE = "scaling.png"
EMERGENCE_FILE = "emergence.png"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class _Measured:
    """A finished run.

    Attributes:
        run: The run.
        flops: Training FLOPs, the base's included.
        tokens: Tokens, the base's included.
        num_parameters: Parameters of its model.
        scores: Held-out scores and those of tasks.
        chances: Scores of guessing, by the name of a task's score.
        infilled: Spans that it has infilled.
    """

    run: LadderRun
    flops: float
    tokens: int
    num_parameters: int
    scores: dict[str, Score]
    chances: dict[str, float | None]
    infilled: tuple[InfilledText, ...]


def write_results(
    ladder: Ladder, runs: Sequence[LadderRun], finished: Collection[str], folder: Path
) -> tuple[list[str], list[Path]]:
    """Write points, tables, figures and the report of a ladder's finished runs; return sentences and files.

    Args:
        ladder: The ladder.
        runs: All its runs.
        finished: Names of those that are trained and measured.
        folder: Folder of the files.

    Raises:
        CheckpointError: If no base is finished.
    """
    measured = [_read(run) for run in runs if run.name in finished]
    if not any(entry.run.arm == BASE for entry in measured):
        raise CheckpointError(f"ladder {ladder.name!r}: none of its bases is finished")
    points = _pool(measured)
    axes, tasks = _list_axes(ladder, measured)
    title = f"{ladder.name}: {len(measured)} of {len(runs)} runs"

    files = [folder / SCALING_FILE]
    pictures = [Picture("Scores over training compute; bars are 95 %.", files[0])]
    plot_scaling(files[0], title, points, axes)
    if tasks:
        files.append(folder / EMERGENCE_FILE)
        caption = "Tasks over training compute; a ring marks the smallest run above chance at 95 %."
        pictures.append(Picture(caption, files[-1]))
        plot_emergence(files[-1], f"{title}, tasks and chance", points, tasks)

    tables = [
        *(tabulate_scores(points, axis) for axis in axes),
        *(tabulate_savings(points, axis) for axis in axes),
        *([tabulate_emergence(points, tasks)] if tasks else []),
    ]
    verdict = [VERDICT_NOTE, *(describe_savings(points, axis) for axis in axes)]
    report = Report(
        title=ladder.name,
        summary=_summarize(ladder, points, measured, len(runs)),
        verdict=verdict,
        pictures=pictures,
        tables=tables,
        examples=_pair_largest(measured, points),
        settings=_list_settings(ladder, measured),
    )
    write_atomically(folder / REPORT_FILE, render_report(report))
    write_atomically(folder / TABLE_FILE, to_markdown(ladder.name, verdict, tables))
    tree = _as_json(points, [*axes, *tasks])
    write_atomically(folder / POINTS_FILE, json.dumps(tree, indent=2) + "\n")
    return verdict, [*files, *(folder / name for name in (REPORT_FILE, TABLE_FILE, POINTS_FILE))]


def record_results(
    ladder: Ladder,
    store: TrackingStore,
    folder: Path,
    files: Sequence[Path],
    suites: Sequence[str],
) -> None:
    """Log a ladder's files to a run of its name in the experiment of its runs, whose page shows their scores.

    Args:
        ladder: The ladder.
        store: The record of its runs.
        folder: Folder of the files.
        files: The files.
        suites: Few-shot suites of its runs, by name or as files.

    Raises:
        ServiceError: If the server fails.
    """
    scores = [
        *(name_evaluation(metric) for metric in ladder.metrics),
        *(name_suite_mean(Path(suite).stem) for suite in suites),
    ]
    note = (folder / TABLE_FILE).read_text(encoding="utf-8").partition("\n\n")[2]
    run_id = store.continue_run(
        ladder.tracking.experiment,
        ladder.name,
        folder,
        tags={"ul2r.role": LADDER_ROLE},
        params={"sizes": ", ".join(ladder.sizes), "arms": ", ".join(ladder.arms)},
        note=note,
    )
    with store.end_on_error(run_id):
        store.log_summary(run_id, {}, files)
        store.show_scores(run_id, scores)
        store.note_experiment(ladder.tracking.experiment, f"Ladder {ladder.name}", note)
    store.end_run(run_id, "FINISHED")


def _read(run: LadderRun) -> _Measured:
    recipe = run.recipe
    dataset = open_run_dataset(recipe)
    scores = load_scores(recipe, dataset)
    assert scores is not None, f"{run.name} is not finished"
    metadata = read_export_metadata(find_export(recipe, dataset))
    values = dict(scores.values)
    chances: dict[str, float | None] = {}
    for suite in recipe.evaluation.few_shot.suites:
        found = find_result(recipe, suite)
        if found is not None:
            folder, result = found
            values[result.suite] = result.mean
            values |= {f"{result.suite}/{task}": score for task, score in result.scores.items()}
            by_task = find_chance(read_items(folder / ITEMS_FILE))
            chances |= {f"{result.suite}/{task}": by_task.get(task) for task in result.scores}
    return _Measured(
        run,
        metadata.flops or 0.0,
        metadata.tokens or 0,
        num_parameters(recipe.model, dataset.vocabulary.size),
        values,
        chances,
        scores.infilled,
    )


def _pool(measured: Sequence[_Measured]) -> list[ScalingPoint]:
    """Return the points of all sizes, budgets and arms, pooled over the seeds that are finished."""
    groups: dict[tuple[str, int, str], list[_Measured]] = defaultdict(list)
    for entry in measured:
        groups[entry.run.size, entry.run.budget, entry.run.arm].append(entry)
    return [
        ScalingPoint(
            size,
            budget,
            arm,
            group[0].num_parameters,
            group[0].tokens,
            float(np.mean([entry.flops for entry in group])),
            len(group),
            {
                name: pool_seeds([entry.scores[name] for entry in group])
                for name in group[0].scores
                if all(name in entry.scores for entry in group)
            },
        )
        for (size, budget, arm), group in groups.items()
    ]


def _list_axes(ladder: Ladder, measured: Sequence[_Measured]) -> tuple[list[Axis], list[Axis]]:
    """Return the scores of the figure, means of suites first, and the tasks with their chance."""
    shared = [
        name for name in measured[0].scores if all(name in entry.scores for entry in measured)
    ]
    metrics = {m.name: m for m in list_metrics(measured[0].run.recipe.evaluation)}
    chances = measured[0].chances
    tasks = [
        Axis(name, name, higher_is_better=True, chance=chances[name])
        for name in shared
        if name in chances
    ]
    suites = [name for name in shared if name not in metrics and name not in chances]
    axes = [
        *(Axis(name, f"{name}, mean of its tasks", higher_is_better=True) for name in suites),
        *(
            Axis(name, metric.label, metric.higher_is_better, metric.digits)
            for name in ladder.metrics
            for metric in [metrics[name]]
        ),
    ]
    return axes, tasks


def _pair_largest(measured: Sequence[_Measured], points: Sequence[ScalingPoint]) -> list[Example]:
    """Return infilled spans of the largest size and budget, with the first seed."""
    size = list_sizes(points)[-1]
    budget = max(point.budget for point in points if point.size == size)
    seed = min(entry.run.seed for entry in measured)
    chosen = [
        entry
        for entry in measured
        if (entry.run.size, entry.run.budget, entry.run.seed) == (size, budget, seed)
    ]
    return pair_examples([(entry.run.arm, entry.infilled) for entry in chosen])


def _summarize(
    ladder: Ladder, points: Sequence[ScalingPoint], measured: Sequence[_Measured], planned: int
) -> str:
    parameters = {point.size: point.num_parameters for point in points}
    sizes = ", ".join(f"{size} ({parameters[size]:,} parameters)" for size in list_sizes(points))
    return (
        f"{len(measured)} of {planned} runs: {sizes}; base after "
        f"{', '.join(f'{budget:,}' for budget in ladder.budgets)} steps; arms {', '.join(list_arms(points))}; "
        f"{len(ladder.seeds)} seeds"
    )


def _list_settings(ladder: Ladder, measured: Sequence[_Measured]) -> list[tuple[str, str]]:
    """Return the ladder and one recipe of each arm."""
    recipes: dict[str, tuple[str, str]] = {}
    for entry in measured:
        recipes.setdefault(entry.run.arm, (entry.run.name, dump(entry.run.recipe)))
    return [("ladder", dump(ladder)), *recipes.values()]


def _as_json(points: Sequence[ScalingPoint], axes: Sequence[Axis]) -> dict[str, Any]:
    return {
        "points": [point.to_dict() for point in points],
        "savings": [
            {"metric": axis.name, "size": size, "budget": budget, "arm": arm, **savings.to_dict()}
            for axis in axes
            for (size, budget, arm), savings in compute_savings(points, axis).items()
        ],
        "chance": {axis.name: axis.chance for axis in axes if axis.chance is not None},
    }
