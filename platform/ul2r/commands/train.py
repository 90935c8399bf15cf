"""Train a run.

    ul2r train RECIPE [--set training.steps=100] [--dry-run]
    torchrun --nproc-per-node 8 jobs/train.py RECIPE

Trains the recipe's model on its objective with Ray Train, from initial weights or from `base`. Run again after it was
stopped, it resumes from the last valid checkpoint; a finished run is left as it is. On SIGTERM it saves a checkpoint
after the current step and ends with exit code 130 (torchrun's own is 1); a second SIGTERM stops it at once, as Ctrl-C
does. With --dry-run nothing is started: the run is checked, and its parameters, memory, FLOPs and expected time are
printed. Started by torchrun, or by Python alone where Ray is not installed, it is the same run without Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

from ul2r.config import Recipe
from ul2r.environment import (
    get_rank,
    has_ray,
    is_started_by_torchrun,
    pause_garbage_collection,
)
from ul2r.workflows.cli import run_job


def run(recipe: Recipe) -> None:
    """Train, then print how far the run is."""
    # Imported here: torchrun's processes need no Ray, and Ray's driver need not wait for Megatron-Core.
    with pause_garbage_collection():
        if is_started_by_torchrun() or not has_ray():
            from ul2r.launch.torchrun import train
        else:
            from ul2r.launch.ray_train.trainer import train

    info = train(recipe)
    # torchrun starts this job on every rank.
    if get_rank() == 0:
        # Those of a base that is no run are not known.
        base = " including its base's" if isinstance(recipe.base, str) else ""
        print(
            f"{info.run_name}: {info.step} steps; {info.tokens:,} tokens and {info.flops:.3g} FLOPs{base}; checkpoints "
            f"in {recipe.paths.checkpoints}"
        )


def print_dry_run(recipe: Recipe) -> None:
    """Print what the run needs, then whether its model can be built."""
    from ul2r.train.trial_build import start_trial_build

    # Begun first and printed last: it takes seconds, in which the report can be read.
    with start_trial_build(recipe) as wait_for_build:
        from ul2r.workflows.dry_run import dry_run

        print(dry_run(recipe), flush=True)
        wait_for_build()
        print("\nMegatron-Core builds this model in this layout.")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line `arguments`, by default the process's; return the exit code."""
    return run_job(__doc__, Recipe, run, print_dry_run, arguments=arguments, program=program)
