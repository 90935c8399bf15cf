"""A worker under Ray Train: reads from Ray Data, reports to the driver and to MLflow."""

from __future__ import annotations

from collections.abc import Iterator

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from ul2r.config import Recipe
from ul2r.data import pipeline
from ul2r.launch.progress import Report
from ul2r.launch.prometheus import PrometheusTracker
from ul2r.launch.worker import run_worker
from ul2r.objective.rows import Rows
from ul2r.tracking.mlflow import MlflowTracker
from ul2r.tracking.tracker import MemoryTracker, Tracker
from ul2r.train.feed import Reader
from ul2r.train.loop import Wish
from ul2r.train.mesh import Mesh


def train_worker(
    *,
    recipe: Recipe,
    fingerprint: str,
    uri: str,
    run_id: str,
    board: ActorHandle,
    tokens_per_step: int,
    owner: str,
) -> None:
    """Train this rank's part; Ray Train has set up its process group.

    Args:
        recipe: The run.
        fingerprint: Its token store's.
        uri: MLflow's address.
        run_id: MLflow's name of the run.
        board: Where rank 0 writes its progress, from `shown_progress`.
        tokens_per_step: Row positions of one step.
        owner: The attempt at the run, from `claim`.
    """
    torch.set_num_threads(max(int(recipe.launch.cpus_per_worker), 1))
    first = ray.train.get_context().get_world_rank() == 0
    report = Report(board, tokens_per_step)

    def run(tracker: Tracker) -> None:
        reached = run_worker(
            recipe,
            tracker,
            report.on_step,
            _reader(recipe),
            owner=owner,
            fingerprint=fingerprint,
            say=report.say,
            wish=lambda: Wish.STOP if report.stop_asked() else Wish.GO_ON,
        )
        tracker.close("FINISHED" if reached.step == recipe.training.steps else "KILLED")

    if not first:
        run(MemoryTracker())
        return
    with MlflowTracker(uri, run_id, recipe.run_folder()) as tracker:
        run(PrometheusTracker(tracker, recipe.name))


def _reader(recipe: Recipe) -> Reader:
    def read(mesh: Mesh, batches: range) -> Iterator[Rows]:
        replicas = recipe.parallel.data
        iterators = broadcast_from_rank_zero(
            pipeline.split(pipeline.make_dataset(recipe, batches, replicas), replicas)
            if mesh.is_first
            else None
        )
        if not mesh.is_reader:
            return iter(())
        return pipeline.read(iterators[mesh.data_rank], recipe, batches, mesh.data_rank, replicas)

    return read
