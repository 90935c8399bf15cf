"""Training in one worker process, whoever started it: mesh, callbacks and train loop put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.order import DataOrder
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.objective.batch import Batch
from ul2r.tracking.tracker import Tracker
from ul2r.train.batch_iterator import BatchSource
from ul2r.train.callbacks import Callback
from ul2r.train.checkpoint.storage import acquire_writer_token
from ul2r.train.loop import Trainer
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.profiler import Profiler
from ul2r.train.monitor.start_report import StartReport
from ul2r.train.monitor.system import SystemMonitor
from ul2r.train.monitor.throughput import ThroughputMonitor
from ul2r.train.monitor.watchdog import Watchdog
from ul2r.train.state import TrainState


def run_worker(
    recipe: Recipe,
    tracker: Tracker,
    source: BatchSource | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    writer_token: str | None = None,
    fingerprint: str | None = None,
) -> TrainState:
    """Train this rank's part of a run to its end, or until a callback of any rank requests to stop.

    The default process group must be initialized.

    Args:
        recipe: The run.
        tracker: Tracker that rank 0 logs to.
        source: Source of the batches; without one this process computes them.
        callbacks: Callbacks besides those of every run; lists may differ between ranks.
        writer_token: Token from `acquire_writer_token`; without one rank 0 acquires it.
        fingerprint: The `run_fingerprint` that its data must have; without one any data are taken.

    Returns:
        The counters of the run after its last step.
    """
    # Workers may start long after the driver's checks: the store must still be the one that was checked.
    dataset = open_run_dataset(recipe, fingerprint)
    mesh = Mesh.join(recipe.parallel, recipe.guards.collective_timeout_s)
    if writer_token is None:
        folder = recipe.paths.checkpoints
        writer_token = mesh.broadcast_from_rank0(lambda: acquire_writer_token(folder))

    # The watchdog starts first: to build a model and to load a checkpoint may hang as well.
    with Watchdog(
        recipe.paths.heartbeats,
        mesh.rank,
        recipe.parallel.num_workers,
        recipe.guards,
    ) as watchdog:
        trainer = Trainer(
            recipe,
            dataset,
            mesh,
            tracker,
            callbacks=[
                watchdog,
                StartReport(recipe),
                # Before the profiler: its clock stops at the end of a step, and a trace takes seconds to write.
                ThroughputMonitor(recipe, dataset.vocabulary, is_reader=mesh.is_reader),
                SystemMonitor(mesh),
                Profiler(recipe, mesh, tracker),
                *callbacks,
            ],
            writer_token=writer_token,
        )
        state = trainer.fit(source or _compute_batches(recipe, dataset))
    mesh.leave()
    return state


def _compute_batches(recipe: Recipe, dataset: TokenDataset) -> BatchSource:
    """Return a source that computes batches in this process."""

    def source(mesh: Mesh, numbers: range, order: DataOrder) -> Iterator[Batch]:
        # A generator's body runs when it is first iterated, hence on reader ranks only.
        builder = BatchBuilder(recipe, dataset, order)
        for number in numbers:
            yield builder.build(number, mesh.data_rank, recipe.parallel.data)

    return source
