"""Set runs side by side.

    python jobs/compare.py COMPARISON [--set storage=FOLDER]

Measures the exports of the comparison's recipes where that has not been done, several at a time, and writes a
table (Markdown, JSON) and a picture to comparisons/NAME in their storage and to MLflow.
"""

from __future__ import annotations

import sys

from rich.console import Console

from ul2r.config import Comparison
from ul2r.evaluation.comparison import as_table
from ul2r.workflows.cli import run_job
from ul2r.workflows.compare import compare


def main(comparison: Comparison) -> None:
    """Compare, print the table, and say where table and picture lie."""
    compared = compare(comparison)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(as_table(comparison.name, compared.arms, compared.metrics))
    print(f"table: {compared.folder / 'table.md'}")
    print(f"picture: {compared.folder / 'comparison.png'}")


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Comparison, main))
