"""Runs of a ladder in Ray tasks, as many at once as the cluster has room for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from ul2r.config import Recipe, dump
from ul2r.console import ProgressBar, show_progress
from ul2r.errors import RunInterrupted, UserError
from ul2r.filesystem import write_atomically
from ul2r.launch.ray_train.cluster import connect_ray
from ul2r.launch.ray_train.elastic import count_cpus
from ul2r.launch.ray_train.entry_point import enter_folder
from ul2r.workflows.ladder_plan import LadderRun, find_ready

logger = logging.getLogger(__name__)

ROUNDING = 1e-6
"""Error of resources that were subtracted and added many times."""


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float

    def fits(self, free: Resources) -> bool:
        """Return whether as many are free, up to rounding."""
        return self.cpus <= free.cpus + ROUNDING and self.gpus <= free.gpus + ROUNDING

    def minus(self, other: Resources) -> Resources:
        """Return what is left without the others."""
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)


@dataclass
class Outcome:
    """Runs of a ladder that ended, well or not.

    Attributes:
        finished: Names of runs that are trained and measured.
        failed: Reasons by name, of runs that failed and of those that continue them.
    """

    finished: set[str]
    failed: dict[str, str] = field(default_factory=dict)


def complete_runs(runs: Sequence[LadderRun], finished: set[str]) -> Outcome:
    """Train, export and measure the runs that are not finished; a failure ends the runs that continue it, no other.

    Args:
        runs: All runs; each comes after the one that it continues.
        finished: Names of those that are trained and measured already.

    Raises:
        UserError: If Ray cannot start, or the cluster has no room for one of the runs.
    """
    outcome = Outcome(set(finished))
    waiting = [run for run in runs if run.name not in finished]
    if not waiting:
        return outcome
    needs = {run.name: count_resources(run.recipe) for run in waiting}
    most = Resources(max(n.cpus for n in needs.values()), max(n.gpus for n in needs.values()))
    with (
        connect_ray(most.cpus, most.gpus, smaller="lower parallel.num_workers"),
        show_progress("scaling", len(runs), "runs", len(finished)) as bar,
    ):
        bar.update(len(finished))
        cluster = ray.cluster_resources()
        free = Resources(cluster.get("CPU", 0), cluster.get("GPU", 0))
        _Schedule(waiting, needs, free, outcome, bar).run()
    return outcome


def count_resources(recipe: Recipe) -> Resources:
    """Return what a run takes of the cluster."""
    launch, workers = recipe.launch, recipe.parallel.num_workers
    # A single worker computes its own batches.
    cpus = launch.cpus_per_worker if workers == 1 else count_cpus(recipe)
    return Resources(cpus, workers * launch.gpus_per_worker)


class _Schedule:
    """Runs that wait, and those in progress.

    Args:
        waiting: Runs that are not begun.
        needs: Resources by name.
        free: Resources of the cluster.
        outcome: Told of each run that ends.
        bar: Shows how many have ended.
    """

    def __init__(
        self,
        waiting: Sequence[LadderRun],
        needs: Mapping[str, Resources],
        free: Resources,
        outcome: Outcome,
        bar: ProgressBar,
    ) -> None:
        self._waiting = list(waiting)
        self._needs = needs
        self._free = free
        self._outcome = outcome
        self._bar = bar
        self._running: dict[ray.ObjectRef, LadderRun] = {}

    def run(self) -> None:
        """Start runs as resources allow until none is left."""
        while self._waiting or self._running:
            self._drop_orphans()
            self._start_some()
            if not self._running:
                continue
            (ended, *_), _ = ray.wait(list(self._running), num_returns=1)
            run = self._running.pop(ended)
            needs = self._needs[run.name]
            self._free = self._free.minus(Resources(-needs.cpus, -needs.gpus))
            self._record(run, ended)

    def _start_some(self) -> None:
        ready = find_ready(self._waiting, self._outcome.finished, set(self._outcome.failed))
        for run in ready:
            needs = self._needs[run.name]
            if not needs.fits(self._free):
                continue
            self._free = self._free.minus(needs)
            self._waiting.remove(run)
            # Ray Train reserves the resources of several workers itself; a run of one is the task itself.
            is_single = run.recipe.parallel.num_workers == 1
            task = ray.remote(
                num_cpus=needs.cpus if is_single else 0,
                num_gpus=needs.gpus if is_single else 0,
                max_retries=0,
                # A process of its own: Megatron-Core keeps the process groups of a run, each with gloo's threads.
                max_calls=1,
            )(_complete_in_folder)
            self._running[task.remote(run.recipe, str(Path.cwd()))] = run

    def _drop_orphans(self) -> None:
        """Give up runs whose base has failed, and those that continue them."""
        for run in list(self._waiting):
            if run.base in self._outcome.failed:
                self._waiting.remove(run)
                self._outcome.failed[run.name] = f"its base {run.base} failed"
                self._show(run.name)

    def _record(self, run: LadderRun, ended: ray.ObjectRef) -> None:
        try:
            seconds = ray.get(ended)
        except RayError as error:
            reason = describe_failure(error)
            self._outcome.failed[run.name] = reason
            # Without the traceback, which is that of another process.
            logger.error("%s failed: %s", run.name, reason)  # noqa: TRY400
        else:
            self._outcome.finished.add(run.name)
            logger.info("%s: trained and measured in %.0f s", run.name, seconds)
        self._show(run.name)

    def _show(self, name: str) -> None:
        self._bar.update(len(self._outcome.finished) + len(self._outcome.failed), name)


def describe_failure(error: RayError) -> str:
    """Return one line: the message of a user error, else the last line of what Ray reports."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, UserError | RunInterrupted):
        return " ".join(str(cause).split())
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _complete_in_folder(recipe: Recipe, folder: str) -> float:
    """Call `complete_run` where the job was started: a task of a running cluster works elsewhere."""
    enter_folder(folder)
    return complete_run(recipe)


def complete_run(recipe: Recipe) -> float:
    """Train a run from where it stands, export and measure it; return the seconds that took.

    Raises:
        UserError: If its base was trained again since it began, or a step fails.
    """
    # Here, in the task's process: the driver needs none of them.
    from ul2r.data.store.dataset import open_run_dataset
    from ul2r.workflows.base_change import check_base
    from ul2r.workflows.evaluate import evaluate_run
    from ul2r.workflows.export import export
    from ul2r.workflows.few_shot_results import run_missing_suites
    from ul2r.workflows.measure_exports import measure_missing

    start = time.monotonic()
    check_base(recipe)
    _train(recipe)
    export(recipe)
    # In this process, whose resources they are; afterwards there is nothing to measure but to record.
    measure_missing(recipe, open_run_dataset(recipe))
    evaluate_run(recipe)
    run_missing_suites(recipe)
    # Last: a run that was cut before is completed by the next call.
    write_atomically(recipe.paths.completed_recipe, dump(recipe))
    return time.monotonic() - start


def _train(recipe: Recipe) -> None:
    # The same rows and checkpoints either way.
    if recipe.parallel.num_workers == 1:
        from ul2r.launch.torchrun import train_tried

        # The driver has tried every size: a process more for each run would cost more than a tiny run itself.
        train_tried(recipe)
    else:
        from ul2r.launch.ray_train.trainer import train

        train(recipe)


def list_failures(outcome: Outcome) -> Iterator[str]:
    """Yield a line for each run that failed."""
    for name, reason in outcome.failed.items():
        yield f"{name}: {reason}"
