"""Weights and optimizer state of all ranks, to and from a checkpoint, whatever the layout of either side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from torch.distributed import ProcessGroup

from ul2r.model.build import load_model, make_sharded_state_dict
from ul2r.train.checkpoint.async_write import BackgroundWrite
from ul2r.train.checkpoint.optimizer_state import sharded_optimizer
from ul2r.train.optimizer import load_settings
from ul2r.train.step import TrainStep


def begin_save(
    folder: Path, train_step: TrainStep, last: Callable[[], None] = lambda: None
) -> BackgroundWrite:
    """Begin to write model and optimizer from all ranks to an empty folder; training may go on at once.

    Args:
        folder: Where to.
        train_step: What to save.
        last: Called, in the background, when this rank has written its part.
    """
    return BackgroundWrite(_sharded_state(train_step), folder, _replicas(), last)


def load_checkpoint(folder: Path, train_step: TrainStep, *, optimizer: bool) -> None:
    """Load weights, and optimizer state if asked, saved under any layout into this one.

    Replicas read a part each, and give it to the others.
    """
    state = _sharded_state(train_step, optimizer=optimizer)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(folder)), _replicas()
    )
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    load_model(train_step.chunks, loaded["model"])
    if optimizer:
        load_settings(train_step.optimizer, loaded["optimizer"])
    else:
        train_step.optimizer.reload_model_params()


def _replicas() -> ProcessGroup:
    """The ranks that hold the same part of the model as this one."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _sharded_state(train_step: TrainStep, *, optimizer: bool = True) -> dict[str, Any]:
    model = make_sharded_state_dict(train_step.chunks)
    if not optimizer:
        return {"model": model}
    return {"model": model, "optimizer": sharded_optimizer(train_step.optimizer, model)}
