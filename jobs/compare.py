"""Compare runs with each other.

    python jobs/compare.py COMPARISON [--set storage=FOLDER]

Measures the exports of the comparison's recipes that have no scores yet, several at a time, and writes a table
(Markdown, JSON) and a plot to comparisons/NAME in their storage and to MLflow.
"""

from __future__ import annotations

import sys

import _interpreter  # noqa: F401  refuses a Python that cannot run the job

from ul2r.config import Comparison
from ul2r.workflows.cli import run_job


def main(comparison: Comparison) -> None:
    """Compare, then print the table and where it and the plot were written."""
    from rich.console import Console

    from ul2r.workflows.compare import PLOT_FILE, TABLE_FILE, compare

    result = compare(comparison)

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # rich assumes 80 columns for a pipe, too few for the table
    console.print(result.table.to_rich())

    print(f"table: {result.folder / TABLE_FILE}")
    print(f"picture: {result.folder / PLOT_FILE}")


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Comparison, main))
