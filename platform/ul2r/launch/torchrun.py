"""A run without Ray: torchrun starts the workers, or this process is the only one; each computes its own batches."""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset, open_run_dataset, run_fingerprint
from ul2r.environment import get_rank, is_started_by_torchrun
from ul2r.errors import CorpusError, LayoutError
from ul2r.launch.preflight import (
    NO_GPU,
    check_run,
    final_checkpoint_info,
    find_resume_checkpoint,
    gpu_environment,
    has_finished,
    mark_finished,
    track_run,
)
from ul2r.launch.stop_signal import StopSignal
from ul2r.launch.worker import run_worker
from ul2r.tracking.store import TrackingStore, check_store
from ul2r.tracking.tracker import MemoryTracker
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.monitor.progress import ProgressBar
from ul2r.train.trial_build import start_trial_build

STORE_TIMEOUT = timedelta(seconds=10)


def train(recipe: Recipe) -> CheckpointInfo:
    """Train the run from where it stands to its last step; called in every process that torchrun starts.

    Without torchrun this process is the only one.

    Rows, losses and checkpoints are those of `ray_train.trainer.train`, so that a run may change between the two.

    Returns:
        Metadata of the run's last checkpoint.

    Raises:
        UserError: If a check fails, or torchrun started another number of processes than the recipe has workers.
        RunInterrupted: After a checkpoint, if any of the processes received SIGTERM.
    """
    return _check_and_train(recipe, try_build=True)


def train_tried(recipe: Recipe) -> CheckpointInfo:
    """Train a run as `train` does, without a trial build of its model, which the caller has done."""
    return _check_and_train(recipe, try_build=False)


def _check_and_train(recipe: Recipe, *, try_build: bool) -> CheckpointInfo:
    dataset = open_run_dataset(recipe)
    check_complete(recipe, dataset)
    # Before the process group is joined: an error on one rank after that would leave the others waiting.
    check_num_processes(recipe)
    resumed = find_resume_checkpoint(recipe)
    check_run(recipe, dataset, resumed)
    is_rank0 = get_rank() == 0
    if resumed is not None and has_finished(recipe, resumed):
        if is_rank0:
            mark_finished(recipe, check_store(recipe.tracking.uri))
        return resumed

    # By rank 0 alone: torchrun ends the others, which wait for it when they join, if it fails.
    store = _check_for_all(recipe, try_build=try_build) if is_rank0 else None
    _join_process_group(recipe)
    # Rank 0's for all: each rank has read the recipe itself, and a branch on the Hub may have moved in between.
    shared = [recipe]
    dist.broadcast_object_list(shared, src=0)
    (recipe,) = shared
    with (
        StopSignal() as stop_signal,
        track_run(recipe, dataset, store) if store is not None else nullcontext(None) as run_id,
    ):
        _train(recipe, dataset, store, run_id, stop_signal)
        # Within `track_run`, so that its record tells of an interrupted run what it is.
        dist.destroy_process_group()
        return final_checkpoint_info(recipe)


def _check_for_all(recipe: Recipe, *, try_build: bool) -> TrackingStore:
    """Check the model and the tracking server; return the store that the run is recorded in.

    Raises:
        UserError: If a check fails.
    """
    # First, in another process: MLflow takes as long to import.
    with start_trial_build(recipe) if try_build else nullcontext(None) as wait_for_build:
        store = check_store(recipe.tracking.uri)
        store.check_experiment(recipe.tracking.experiment)
        if wait_for_build is not None:
            wait_for_build()
        return store


def is_first_to_report(message: str) -> bool:
    """Return whether this process is the first of those that torchrun started to report a message.

    All of them run the same checks, and most errors are everybody's.

    Args:
        message: Text that several processes may report.
    """
    # torchrun 2.13 says that its own store, which outlives its processes, is the one at MASTER_ADDR.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not listed by torch
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"ul2r/{attempt}/{message}", 1) == 1
    # Without the store, a message too many is better than none.
    except dist.DistError:
        return True


def check_complete(recipe: Recipe, dataset: TokenDataset) -> None:
    """Check that no part of a streamed store is still to be built.

    Raises:
        CorpusError: If some is.
    """
    if not dataset.manifest.is_complete:
        raise CorpusError(
            f"{recipe.storage_paths.store}: is not complete, and only Ray builds the rest while a run trains: run "
            "`ul2r prepare RECIPE` first, or train without torchrun"
        )


def check_num_processes(recipe: Recipe) -> None:
    """Check that torchrun started as many processes as the recipe has workers.

    Raises:
        LayoutError: If it did not.
    """
    num_workers = recipe.parallel.num_workers
    if not is_started_by_torchrun():
        if num_workers != 1:
            raise LayoutError(
                f"without Ray this is one process, parallel.num_workers={num_workers}: start it with "
                f"torchrun --nproc-per-node {num_workers}, or install Ray"
            )
        return
    num_started = int(os.environ["WORLD_SIZE"])
    if num_started != num_workers:
        raise LayoutError(
            f"torchrun started {num_started} processes, parallel.num_workers={num_workers}: "
            f"set torchrun's --nnodes x --nproc-per-node to {num_workers}"
        )


def _join_process_group(recipe: Recipe) -> None:
    launch = recipe.launch
    # As under Ray Train. Torch's own, 10 minutes with NCCL, would end ranks before the watchdog can name the one that
    # hangs.
    timeout = timedelta(seconds=recipe.guards.collective_timeout_s)
    # A store in memory needs no port.
    alone: dict[str, Any] = (
        {} if is_started_by_torchrun() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]  # public, but not listed by torch
    )
    # torch would take all cores of the machine in each of its processes.
    torch.set_num_threads(max(int(launch.cpus_per_worker), 1))
    if launch.gpus_per_worker:
        # Before the first call that starts CUDA, which reads it.
        os.environ.update(gpu_environment(recipe.parallel))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout, **alone)
    else:
        os.environ.update(NO_GPU)
        dist.init_process_group("gloo", timeout=timeout, **alone)


def _train(
    recipe: Recipe,
    dataset: TokenDataset,
    store: TrackingStore | None,
    run_id: str | None,
    stop_signal: StopSignal,
) -> None:
    """Train this rank's part; rank 0, which alone has a store and a `run_id`, logs and shows a bar."""
    fingerprint = run_fingerprint(recipe, dataset)
    if store is None or run_id is None:
        run_worker(recipe, MemoryTracker(), callbacks=[stop_signal], fingerprint=fingerprint)
        return

    with store.open_tracker(run_id, recipe.paths.folder) as tracker:
        callbacks = [stop_signal, ProgressBar(recipe)]
        state = run_worker(recipe, tracker, callbacks=callbacks, fingerprint=fingerprint)
        # Closed here with its status; the end of the block would close it as FINISHED, and a second call does nothing.
        tracker.close("FINISHED" if state.step == recipe.training.steps else "KILLED")
