"""Compare runs with each other.

    ul2r compare COMPARISON [--set storage=FOLDER]

Measures the exports of the comparison's recipes that have no scores yet, several at a time, and writes a table
(Markdown, JSON), a plot and a report to comparisons/NAME in their storage and to MLflow. The report is one HTML file
that opens offline.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Comparison
from ul2r.workflows.cli import run_job


def run(comparison: Comparison) -> None:
    """Compare, then print the table and where it and the plot were written."""
    from ul2r.console import print_table
    from ul2r.workflows.compare import PLOT_FILE, TABLE_FILE, compare
    from ul2r.workflows.comparison_report import REPORT_FILE

    result = compare(comparison)
    print_table(result.table.to_rich())

    if result.few_shot is not None:
        print(f"{result.few_shot}\n")
    print(f"table: {result.folder / TABLE_FILE}")
    print(f"picture: {result.folder / PLOT_FILE}")
    print(f"report: {result.folder / REPORT_FILE}")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Comparison, run, arguments=arguments, program=program)
