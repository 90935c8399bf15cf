"""A worker under Ray Train: reads from Ray Data, reports to the driver and to MLflow."""

from __future__ import annotations

from collections.abc import Iterator

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from ul2r.config import Recipe
from ul2r.data import loader
from ul2r.launch.logs import forward_logs
from ul2r.launch.ray_train.progress import Report
from ul2r.launch.ray_train.prometheus import PrometheusTracker
from ul2r.launch.worker import run_worker
from ul2r.objective.batch import Batch
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.tracker import MemoryTracker, Tracker
from ul2r.train.batch_iterator import BatchSource
from ul2r.train.loop import LoopAction
from ul2r.train.mesh import Mesh

PREEMPTION_STEPS = 10
"""Steps between two looks whether a machine is about to be taken away, each of which costs some 10 ms."""


def train_worker(
    *,
    recipe: Recipe,
    fingerprint: str,
    uri: str,
    run_id: str,
    board: ActorHandle,
    tokens_per_step: int,
    writer_token: str,
) -> None:
    """Train this rank's part; Ray Train has set up its process group.

    Args:
        recipe: The run.
        fingerprint: Its token store's.
        uri: MLflow's address.
        run_id: MLflow's name of the run.
        board: Where rank 0 writes its progress, from `shown_progress`.
        tokens_per_step: Row positions of one step.
        writer_token: The attempt at the run, from `acquire_writer_token`.
    """
    torch.set_num_threads(max(int(recipe.launch.cpus_per_worker), 1))
    rank = ray.train.get_context().get_world_rank()
    report = Report(board, tokens_per_step)

    def run(tracker: Tracker) -> None:
        reached = run_worker(
            recipe,
            tracker,
            report.on_step,
            _reader(recipe),
            writer_token=writer_token,
            fingerprint=fingerprint,
            wish=_Wishes(report),
        )
        tracker.close("FINISHED" if reached.step == recipe.training.steps else "KILLED")

    with forward_logs(report.log, rank):
        if rank != 0:
            run(MemoryTracker())
            return
        with MlflowTracker(uri, run_id, recipe.paths.folder) as tracker:
            run(PrometheusTracker(tracker, recipe.name))


class _Wishes:
    """What a worker wants at the end of a step: a checkpoint before a machine is taken away, or the end.

    Ray Train starts the workers again when it has been taken. All of them ask it at the same steps.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._steps = 0
        self._leaving = set[str]()

    def __call__(self) -> LoopAction:
        self._steps += 1
        noticed = self._steps % PREEMPTION_STEPS == 0 and self._is_noticed()
        if self._report.stop_asked():
            return LoopAction.STOP
        return LoopAction.SAVE if noticed else LoopAction.CONTINUE

    def _is_noticed(self) -> bool:
        """Whether machines are to leave that were not before."""
        notice = ray.train.get_preemption_info()
        before, self._leaving = self._leaving, set(notice.preempted_node_ids) if notice else set()
        return bool(self._leaving - before)


def _reader(recipe: Recipe) -> BatchSource:
    def read(mesh: Mesh, batches: range) -> Iterator[Batch]:
        replicas = recipe.parallel.data
        iterators = broadcast_from_rank_zero(
            loader.split_for_replicas(loader.make_dataset(recipe, batches, replicas), replicas)
            if mesh.is_rank0
            else None
        )
        if not mesh.is_reader:
            return iter(())
        return loader.iter_batches(iterators[mesh.data_rank], recipe, batches, mesh.data_rank, replicas)

    return read
