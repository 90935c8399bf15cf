"""Train a run.

    python jobs/train.py RECIPE [--set training.steps=100] [--dry-run]

Trains the recipe's model on its objective with Ray Train, from initial weights or from `base`. Stopped and
run again, it goes on from the last checkpoint; a finished run is left as it is. With --dry-run nothing is started:
the run is checked, and its parameters, memory, FLOPs and expected time are printed.
"""

from __future__ import annotations

import sys

from ul2r.config import Recipe
from ul2r.launch.command import run_job
from ul2r.launch.dry_run import dry_run
from ul2r.launch.trainer import train


def main(recipe: Recipe) -> None:
    """Train, then say where the run stands."""
    info = train(recipe)
    print(
        f"{info.run}: {info.step} steps, {info.tokens:,} tokens and {info.flops:.3g} FLOPs with its ancestors', "
        f"checkpoints in {recipe.run_folder() / 'checkpoints'}"
    )


def show(recipe: Recipe) -> None:
    """Say what the run needs."""
    print(dry_run(recipe))


if __name__ == "__main__":
    sys.exit(run_job(__doc__, Recipe, main, show))
