"""Tables and sentences of a ladder: scores, savings, and where tasks emerge."""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.evaluation.plot import ROLE_LABELS
from ul2r.evaluation.report import Cell, ReportTable
from ul2r.evaluation.scaling.emergence import find_emergence
from ul2r.evaluation.scaling.points import (
    BASE,
    Axis,
    ScalingPoint,
    compute_savings,
    list_arms,
    list_sizes,
)

SCORE_NOTES = (
    "Means over seeds, of which a score names its number if others have more. ± is one standard error, of the seeds' "
    "scatter and of the held-out text or items together; that of a single seed has no scatter.",
)
SAVINGS_NOTES = (
    "FLOPs at which the base of the same size, trained on, reaches the arm's score, over those of the arm, its base's "
    "included; in brackets the 95 % interval. The base's curve is a rising fit to its checkpoints, straight in the "
    "logarithm of FLOPs, and is not prolonged: 'not reached' means that its last checkpoint is not as good, 'below' "
    "that its first one is at least as good.",
    "The interval takes the errors of all scores as independent, which is cautious, since all models read the same "
    "held-out text.",
)
VERDICT_NOTE = (
    "Points, of a size and budget each, at which an arm saves compute against its base trained on, costs more, or is "
    "left open by the 95 % interval or the end of the base's curve:"
)


def tabulate_scores(points: Sequence[ScalingPoint], axis: Axis) -> ReportTable:
    """Return the scores of all arms by size and budget."""
    arms = [BASE, *list_arms(points)]
    by_key = {(point.size, point.budget, point.arm): point for point in points}
    most = max(point.num_seeds for point in points)
    rows = []
    for size, budget in _list_rungs(points):
        found = {arm: by_key.get((size, budget, arm)) for arm in arms}
        sign = 1 if axis.higher_is_better else -1
        best = max(sign * point.scores[axis.name].mean for point in found.values() if point)
        cells = [
            Cell(_format_score(point, axis, most), sign * point.scores[axis.name].mean == best)
            if point
            else Cell("")
            for point in found.values()
        ]
        rows.append([Cell(size), Cell(f"{budget:,}"), *cells])
    headings = ["size", "base steps", *(ROLE_LABELS.get(arm, arm) for arm in arms)]
    arrow = "↑" if axis.higher_is_better else "↓"
    return ReportTable(f"{axis.label} {arrow}", headings, rows, SCORE_NOTES)


def _format_score(point: ScalingPoint, axis: Axis, most: int) -> str:
    """Return a score, and its number of seeds if that is not the most of all."""
    text = point.scores[axis.name].format(axis.digits)
    if point.num_seeds == most:
        return text
    return f"{text} ({point.num_seeds} seed{'s' if point.num_seeds > 1 else ''})"


def tabulate_savings(points: Sequence[ScalingPoint], axis: Axis) -> ReportTable:
    """Return what each arm saves, by size and budget."""
    arms = list_arms(points)
    savings = compute_savings(points, axis)
    rows = []
    for size, budget in _list_rungs(points):
        cells = []
        for arm in arms:
            found = savings.get((size, budget, arm))
            cells.append(Cell(found.describe(), found.saves is True) if found else Cell(""))
        rows.append([Cell(size), Cell(f"{budget:,}"), *cells])
    headings = ["size", "base steps", *(ROLE_LABELS.get(arm, arm) for arm in arms)]
    return ReportTable(f"Savings by {axis.label}", headings, rows, SAVINGS_NOTES)


def tabulate_emergence(points: Sequence[ScalingPoint], tasks: Sequence[Axis]) -> ReportTable:
    """Return the smallest run above chance, by task and arm."""
    arms = [BASE, *list_arms(points)]
    rows = []
    for task in tasks:
        cells = []
        for arm in arms:
            found = find_emergence([point for point in points if point.arm == arm], task)
            cells.append(
                Cell(f"{found.size}, {found.budget:,} steps, {found.flops:.2g} FLOPs")
                if found
                else Cell("none")
            )
        chance = "unknown" if task.chance is None else f"{task.chance:.{task.digits}f}"
        rows.append([Cell(task.label), Cell(chance), *cells])
    headings = ["task", "chance", *(ROLE_LABELS.get(arm, arm) for arm in arms)]
    notes = (
        "The run of the fewest FLOPs that is above chance at 95 % (one-sided), as are all longer trainings of its size "
        "and arm.",
    )
    return ReportTable("Smallest run above chance", headings, rows, notes)


def describe_savings(points: Sequence[ScalingPoint], axis: Axis) -> str:
    """Return how many points of each arm save compute, cost more, or are left open; see `VERDICT_NOTE`."""
    savings = compute_savings(points, axis)
    counts = []
    for arm in list_arms(points):
        found = [value.saves for (_, _, other), value in savings.items() if other == arm]
        counts.append(
            f"{ROLE_LABELS.get(arm, arm)} saves at {found.count(True)}, costs more at {found.count(False)}, open at "
            f"{found.count(None)}"
        )
    return f"{axis.label}: {'; '.join(counts) or 'nothing continues the base'}."


def to_markdown(title: str, verdict: Sequence[str], tables: Sequence[ReportTable]) -> str:
    """Return the sentences and tables as a Markdown page; notes that several tables share come once."""
    lines = [f"# {title}", ""]
    for paragraph in verdict:
        lines += [paragraph, ""]
    for table in tables:
        lines += [f"## {table.title}", "", f"| {' | '.join(table.columns)} |"]
        lines.append(f"|---|{'---:|' * (len(table.columns) - 1)}")
        for row in table.rows:
            cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def _list_rungs(points: Sequence[ScalingPoint]) -> list[tuple[str, int]]:
    sizes = list_sizes(points)
    rungs = {(point.size, point.budget) for point in points}
    return sorted(rungs, key=lambda rung: (sizes.index(rung[0]), rung[1]))
