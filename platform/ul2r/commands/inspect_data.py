"""Show what a run is trained on.

    ul2r inspect RECIPE [--set KEY=VALUE]

Writes an HTML page into the run's folder: real examples of each denoiser, with modes, sentinels, inputs and targets
colored and attention drawn, and the mixture's statistics as measured in the run's first rows. Every run in MLflow
has the same page among its artifacts.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Recipe
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Write the page, then print where it is."""
    from ul2r.data.inspection import write_page
    from ul2r.data.store.dataset import open_run_dataset
    from ul2r.launch.preflight import find_resume_checkpoint, plan_run_data

    dataset = open_run_dataset(recipe)
    plan = plan_run_data(recipe, dataset, find_resume_checkpoint(recipe))
    path = write_page(recipe, dataset, plan.order)
    print(f"{recipe.name}: open {path} in a browser")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Recipe, run, arguments=arguments, program=program)
