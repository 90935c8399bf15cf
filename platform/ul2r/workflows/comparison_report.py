"""The HTML report of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ul2r.evaluation.comparison import Arm, Role
from ul2r.evaluation.comparison_table import ComparisonTable
from ul2r.evaluation.report import Cell, Picture, Report, ReportTable, pair_examples, render_report
from ul2r.evaluation.verdict import describe_verdict
from ul2r.filesystem import write_atomically

REPORT_FILE = "report.html"
FEW_SHOT_NOTE = (
    "Second minus first on the same items and few-shot examples, ± one standard error; in brackets the 95 % bootstrap "
    "interval. Bold: it does not include 0."
)


def write_report(
    folder: Path,
    table: ComparisonTable,
    pictures: Sequence[Picture],
    few_shot: Path | None,
    settings: Mapping[Role, str],
) -> Path | None:
    """Write the report of a comparison; return its file, None if it is there as it would be written.

    Args:
        folder: Folder of the comparison.
        table: Its scores.
        pictures: Its plots.
        few_shot: Paired differences of few-shot results, None if there are none.
        settings: Text of each column's recipe.
    """
    tables = [_tabulate_scores(table), _tabulate_arms(table.arms)]
    if few_shot is not None:
        tables += _tabulate_few_shot(json.loads(few_shot.read_text(encoding="utf-8")))
    page = render_report(
        Report(
            title=table.name,
            summary=f"{', '.join(arm.role for arm in table.arms)} on the same held-out text",
            verdict=describe_verdict(table),
            pictures=pictures,
            tables=tables,
            examples=pair_examples([(arm.role, arm.scores.infilled) for arm in table.arms]),
            settings=list(settings.items()),
        )
    )
    path = folder / REPORT_FILE
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        return None
    write_atomically(path, page)
    return path


def _tabulate_scores(table: ComparisonTable) -> ReportTable:
    rows = []
    for metric in table.metrics:
        best = table.best_roles(metric)
        cells = [
            Cell(arm.scores[metric.name].format(metric.digits), arm.role in best)
            for arm in table.arms
        ]
        # In a narrow column the arrow stays with the last word.
        title = "\N{NO-BREAK SPACE}".join(metric.title.rsplit(" ", 1))
        rows.append([Cell(title), *cells])
    return ReportTable(
        "Scores", ["held out", *(arm.role for arm in table.arms)], rows, table.notes()
    )


def _tabulate_arms(arms: Sequence[Arm]) -> ReportTable:
    rows = [
        [
            Cell(arm.role),
            Cell(arm.metadata.run),
            Cell(f"{arm.metadata.step:,}" if arm.metadata.step else "unknown"),
            Cell(f"{arm.metadata.tokens:,}" if arm.metadata.tokens else "unknown"),
            Cell(f"{arm.metadata.flops:.3g}" if arm.metadata.flops else "unknown"),
            Cell(arm.metadata.attention),
        ]
        for arm in arms
    ]
    columns = ["arm", "run", "steps", "tokens", "FLOPs", "attention"]
    notes = ["Tokens and FLOPs include those of the base."]
    return ReportTable("Runs", columns, rows, notes)


def _tabulate_few_shot(entries: Sequence[Mapping[str, Any]]) -> list[ReportTable]:
    """Return a table for each pair of results on a suite."""
    tables = []
    for entry in entries:
        rows = []
        for task, paired in entry["differences"].items():
            difference = paired["difference"]
            is_clear = paired["low"] > 0 or paired["high"] < 0
            text = f"{difference['mean']:+.4f} ± {difference['stderr']:.4f}"
            interval = f"{paired['low']:+.4f} to {paired['high']:+.4f}"
            rows.append(
                [
                    Cell(task),
                    Cell(text, is_clear),
                    Cell(interval, is_clear),
                    Cell(f"{difference['count']:,}"),
                ]
            )
        title = f"{entry['suite']}: {entry['second']} against {entry['first']}"
        columns = ["task", "difference", "95 % interval", "items (tasks)"]
        notes = [FEW_SHOT_NOTE]
        if entry["pooling"] is not None:
            notes.append(f"Scores are {entry['pooling']}.")
        tables.append(ReportTable(title, columns, rows, notes))
    return tables
