"""A run without Ray: torchrun starts the workers, and each computes its own batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from ul2r.config import Recipe
from ul2r.console import show_progress
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.errors import CorpusError, LayoutError
from ul2r.launch.preflight import (
    NO_GPU,
    check_run,
    gpu_environment,
    latest_checkpoint_info,
    mark_finished,
    track_run,
)
from ul2r.launch.stop_signal import sigterm_noted
from ul2r.launch.worker import run_worker
from ul2r.tracking.mlflow import MlflowTracker, check_server
from ul2r.tracking.tracker import MemoryTracker
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.loop import LoopAction
from ul2r.train.state import summary


def train(recipe: Recipe) -> CheckpointInfo:
    """What `trainer.train` does, called in each of the processes that torchrun started.

    Rows, losses and checkpoints are the same, so a run may go on under Ray and the other way round.

    Returns:
        The description of the run's last checkpoint.

    Raises:
        UserError: If a check fails, or torchrun started another number of processes than the recipe has workers.
        KeyboardInterrupt: After a checkpoint, if any of the processes got SIGTERM.
    """
    dataset = open_dataset(recipe.storage_paths.store)
    if not dataset.manifest.is_complete:
        raise CorpusError(
            f"{recipe.storage_paths.store}: is not complete, and only Ray makes the rest while a run trains: run "
            "jobs/prepare.py RECIPE first, or train without torchrun"
        )
    started = int(os.environ["WORLD_SIZE"])
    if started != recipe.parallel.num_workers:
        raise LayoutError(
            f"torchrun started {started} processes, parallel.num_workers={recipe.parallel.num_workers}: "
            f"set torchrun's --nnodes x --nproc-per-node to {recipe.parallel.num_workers}"
        )
    reached = check_run(recipe, dataset)
    uri = check_server(recipe.tracking.uri)
    is_first = os.environ["RANK"] == "0"
    if reached is not None and reached.is_finished:
        if is_first:
            mark_finished(recipe, uri)
        return reached
    _join_group(recipe)
    with (
        sigterm_noted() as stopped,
        track_run(recipe, dataset, uri) if is_first else nullcontext(None) as run_id,
    ):
        _train(
            recipe,
            dataset,
            uri,
            run_id,
            lambda: LoopAction.STOP if stopped.is_set() else LoopAction.CONTINUE,
        )
        dist.destroy_process_group()
        reached = latest_checkpoint_info(recipe)
        if not reached.is_finished:
            raise KeyboardInterrupt
    return reached


def _join_group(recipe: Recipe) -> None:
    launch = recipe.launch
    torch.set_num_threads(max(int(launch.cpus_per_worker), 1))
    if launch.gpus_per_worker:
        os.environ.update(gpu_environment(recipe.parallel))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=default_pg_timeout)
    else:
        os.environ.update(NO_GPU)
        dist.init_process_group("gloo")


def _train(
    recipe: Recipe,
    dataset: TokenDataset,
    uri: str,
    run_id: str | None,
    wish: Callable[[], LoopAction],
) -> None:
    """Train this rank's part; the first rank, which alone has a `run_id`, logs and shows a bar."""
    fingerprint = dataset.manifest.fingerprint
    if run_id is None:
        run_worker(recipe, MemoryTracker(), lambda *_: None, fingerprint=fingerprint, wish=wish)
        return
    per_step = recipe.training.global_batch_size * recipe.objective.sequence_length
    with (
        MlflowTracker(uri, run_id, recipe.paths.folder) as tracker,
        show_progress(recipe.name, recipe.training.steps * per_step, "tokens") as bar,
    ):
        reached = run_worker(
            recipe,
            tracker,
            lambda reached, metrics: bar.update(reached.step * per_step, summary(metrics)),
            fingerprint=fingerprint,
            wish=wish,
        )
        tracker.close("FINISHED" if reached.step == recipe.training.steps else "KILLED")
