"""Run a ladder: one experiment over sizes, budgets, arms and seeds, and the curve of scores over compute.

    ul2r scaling LADDER [--set storage=FOLDER] [--dry-run]

Trains, exports and measures every run of the ladder, as many at once as the machine or the Ray cluster that RAY_ADDRESS
names has room for. Bases are trained once for all arms that continue them. Run again after it was stopped, it keeps
what is finished and goes on with the rest. Each run has a recipe in ladders/NAME/recipes in the storage; next to them
are tables, figures and a report. With --dry-run nothing is started: recipes are checked, and steps, FLOPs and expected
time are printed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config.ladder import Ladder
from ul2r.workflows.cli import run_job


def run(ladder: Ladder) -> None:
    """Complete the ladder, then print what it shows and where.

    Raises:
        LaunchError: If runs have failed; what the others show is printed first.
    """
    from ul2r.errors import LaunchError
    from ul2r.workflows.ladder_results import REPORT_FILE, SCALING_FILE
    from ul2r.workflows.scaling import run_ladder

    result = run_ladder(ladder)
    for sentence in result.verdict:
        print(sentence)
    print(f"\nreport: {result.folder / REPORT_FILE}")
    print(f"picture: {result.folder / SCALING_FILE}")
    if result.failed:
        raise LaunchError(
            f"{len(result.failed)} runs failed, all others are finished: {'; '.join(result.failed)}; run the same "
            "command again to go on with them"
        )


def print_dry_run(ladder: Ladder) -> None:
    """Print the plan."""
    from ul2r.console import print_table
    from ul2r.workflows.scaling import describe_plan

    table, summary = describe_plan(ladder)
    print_table(table)
    print(summary)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Ladder, run, print_dry_run, arguments=arguments, program=program)
