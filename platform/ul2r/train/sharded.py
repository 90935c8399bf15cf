"""Weights and optimizer state of all ranks, to and from a checkpoint, whatever the layout of either side."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from ul2r.model.build import load_model, sharded_model, sharding_metadata
from ul2r.train.checkpoint import CheckpointInfo, CheckpointStore
from ul2r.train.optimizer import load_optimizer
from ul2r.train.step import TrainStep


def save_checkpoint(store: CheckpointStore, train_step: TrainStep, info: CheckpointInfo) -> None:
    """Write model and optimizer from all ranks; the checkpoint counts once the pointer is switched.

    Raises:
        CheckpointError: If another attempt at the run has begun since.
    """
    beside = store.beside(info.step)
    first = dist.get_rank() == 0
    if first:
        beside.mkdir()
    dist.barrier()
    _report_in_process()
    dist_checkpointing.save(_sharded_state(train_step), str(beside))
    dist.barrier()
    if first:
        info.write(beside)
        store.finish(info.step)
    dist.barrier()


def load_checkpoint(folder: Path, train_step: TrainStep, *, optimizer: bool) -> None:
    """Load weights, and optimizer state if asked, saved under any layout into this one."""
    state = _sharded_state(train_step, loading=True, optimizer=optimizer)
    loaded = dist_checkpointing.load(state, str(folder))
    load_model(train_step.chunks, loaded["model"])
    if optimizer:
        load_optimizer(train_step.optimizer, loaded["optimizer"])
    else:
        train_step.optimizer.reload_model_params()


def _report_in_process() -> None:
    """Let a save that this process waits for report what it wrote to this process.

    Megatron-Core 0.16 starts a server process for each rank to report to, as an asynchronous save needs. It takes
    seconds to import torch, and stays behind where the rank is killed.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _sharded_state(
    train_step: TrainStep, *, loading: bool = False, optimizer: bool = True
) -> dict[str, Any]:
    model = sharded_model(train_step.chunks)
    if not optimizer:
        return {"model": model}
    state = train_step.optimizer.sharded_state_dict(
        model, is_loading=loading, metadata=sharding_metadata()
    )
    return {"model": model, "optimizer": state}
