"""A worker under Ray Train: reads from Ray Data, reports to the driver and to MLflow."""

from __future__ import annotations

from collections.abc import Iterator

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from ul2r.config import Recipe
from ul2r.data import loader
from ul2r.data.sampling.order import DataOrder
from ul2r.launch.logs import forward_logs
from ul2r.launch.ray_train.progress import BoardReporter
from ul2r.launch.ray_train.prometheus import PrometheusGauges
from ul2r.launch.worker import run_worker
from ul2r.objective.batch import Batch
from ul2r.tracking.store import open_store
from ul2r.tracking.tracker import MemoryTracker, Tracker
from ul2r.train.batch_iterator import BatchSource
from ul2r.train.callbacks import Callback, LoopAction
from ul2r.train.mesh import Mesh

PREEMPTION_STEPS = 10
"""Steps between two looks for preemption notices, each of which takes some 10 ms."""


def train_worker(
    *,
    recipe: Recipe,
    fingerprint: str,
    uri: str,
    run_id: str,
    board: ActorHandle,
    writer_token: str,
) -> None:
    """Train this rank's part; Ray Train has set up the process group.

    Args:
        recipe: The run.
        fingerprint: Fingerprint of its token store.
        uri: Address of the tracking store.
        run_id: ID of the run there.
        board: Actor of the driver's `Board`.
        writer_token: Token from `acquire_writer_token`.
    """
    torch.set_num_threads(max(int(recipe.launch.cpus_per_worker), 1))
    rank = ray.train.get_context().get_world_rank()
    reporter = BoardReporter(recipe, board)
    # Ray Train calls this function when the processes of all workers run.
    if rank == 0:
        reporter.begin()

    def train(tracker: Tracker, *callbacks: Callback) -> None:
        state = run_worker(
            recipe,
            tracker,
            _read_from_ray_data(recipe),
            callbacks=[reporter, PreemptionMonitor(), *callbacks],
            writer_token=writer_token,
            fingerprint=fingerprint,
        )
        # Closed here with its status; the end of the block would close it as FINISHED, and a second call does nothing.
        tracker.close("FINISHED" if state.step == recipe.training.steps else "KILLED")

    with forward_logs(reporter.log, rank):
        if rank != 0:
            train(MemoryTracker())
            return
        with open_store(uri).open_tracker(run_id, recipe.paths.folder) as tracker:
            train(tracker, PrometheusGauges(recipe.name))


class PreemptionMonitor(Callback):
    """Requests a checkpoint when the cluster announces that it will take a machine away.

    Ray Train restarts the workers when the machine is gone.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._leaving = set[str]()

    def requested_action(self) -> LoopAction:
        """Return SAVE if machines are to leave that were not before; looks every `PREEMPTION_STEPS` steps."""
        self._num_steps += 1
        if self._num_steps % PREEMPTION_STEPS != 0:
            return LoopAction.CONTINUE
        notice = ray.train.get_preemption_info()
        before, self._leaving = self._leaving, set(notice.preempted_node_ids) if notice else set()
        return LoopAction.SAVE if self._leaving - before else LoopAction.CONTINUE


def _read_from_ray_data(recipe: Recipe) -> BatchSource:
    """Return a source that has Ray Data compute batches; it is collective, since rank 0 splits the data for all."""

    def source(mesh: Mesh, numbers: range, order: DataOrder) -> Iterator[Batch]:
        num_replicas = recipe.parallel.data
        # By Ray rather than torch.distributed: iterators hold actor handles, which only Ray itself may serialize.
        iterators = broadcast_from_rank_zero(
            loader.split_for_replicas(
                loader.make_dataset(recipe, numbers, num_replicas, order), num_replicas
            )
            if mesh.is_rank0
            else None
        )
        if not mesh.is_reader:
            return iter(())
        return loader.iter_batches(
            iterators[mesh.data_rank], recipe, numbers, mesh.data_rank, num_replicas
        )

    return source
