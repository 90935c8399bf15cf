"""Measure a run on held-out text.

    ul2r evaluate RECIPE [--set evaluation.num_rows=128]

Measures the run's export, prints the scores, stores them in the run's folder as evaluation.json and adds them to the
run in MLflow. A run that was measured with the same settings before is not measured again.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Measure and record the run, then print its scores."""
    from rich.console import Console

    from ul2r.workflows.evaluate import evaluate_run, make_score_table

    Console().print(make_score_table(recipe, evaluate_run(recipe)))


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Recipe, run, arguments=arguments, program=program)
