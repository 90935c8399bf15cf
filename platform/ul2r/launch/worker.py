"""What every worker does, under Ray Train or in a test alike: put the parts together and train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.objective.batch import Batch
from ul2r.tracking.tracker import Tracker
from ul2r.train.batch_iterator import BatchSource
from ul2r.train.checkpoint.storage import acquire_writer_token
from ul2r.train.loop import LoopAction, Trainer, go_on
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.watchdog import Watchdog
from ul2r.train.state import TrainState


def run_worker(
    recipe: Recipe,
    tracker: Tracker,
    on_step: Callable[[TrainState, Mapping[str, float]], None],
    read: BatchSource | None = None,
    *,
    writer_token: str | None = None,
    fingerprint: str | None = None,
    wish: Callable[[], LoopAction] = go_on,
) -> TrainState:
    """Train this rank's part to the end, or until a wish to stop; the default process group must be initialized.

    Args:
        recipe: The run.
        tracker: Where rank 0 logs.
        on_step: Called on rank 0 after each step.
        read: Where batches come from; without it they are computed in this process.
        writer_token: The attempt at the run, from `acquire_writer_token`; without it this is one of its own.
        fingerprint: The token store's that the run was started on; without it any is taken.
        wish: Asked on every rank after each step; the strongest wish of all ranks counts.

    Returns:
        Where the run stands after its last step.
    """
    dataset = open_dataset(recipe.storage_paths.store, fingerprint)
    mesh = Mesh.join(recipe.parallel)

    def read_in_process(mesh: Mesh, batches: range) -> Iterator[Batch]:
        made = BatchBuilder(recipe, dataset)
        for batch in batches:
            yield made.build(batch, mesh.data_rank, recipe.parallel.data)

    checkpoints = recipe.paths.checkpoints
    writer_token = writer_token or mesh.broadcast_from_rank0(
        lambda: acquire_writer_token(checkpoints)
    )
    heartbeats, timeout_s = recipe.paths.heartbeats, recipe.guards.hang_timeout_s
    with Watchdog(heartbeats, dist.get_rank(), dist.get_world_size(), timeout_s) as watchdog:
        loop = Trainer(
            recipe,
            dataset,
            mesh,
            tracker,
            on_step=on_step,
            beat=watchdog.beat,
            writer_token=writer_token,
            wish=wish,
        )
        reached = loop.run(read or read_in_process)
    mesh.leave()
    return reached
