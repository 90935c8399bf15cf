"""Saving and loading of all ranks' weights and optimizer state, under any layout on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor, serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import common as common_strategies
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ul2r.errors import CheckpointError
from ul2r.model.build import load_model, make_sharded_state_dict
from ul2r.model.restricted_reader import RestrictedReader, load_restricted
from ul2r.train.checkpoint.async_write import AsyncWrite
from ul2r.train.checkpoint.optimizer_state import shard_optimizer_state
from ul2r.train.optimizer import load_optimizer_settings
from ul2r.train.step import TrainStep

COMMON_OBJECT = "common_state/shard_0_1"
"""Name by which Megatron-Core 0.19 stores what is not sharded."""


def start_save(
    folder: Path, train_step: TrainStep, on_written: Callable[[], None] = lambda: None
) -> AsyncWrite:
    """Start to write model and optimizer from all ranks; training may go on when this returns.

    Args:
        folder: An empty folder.
        train_step: Model and optimizer to save.
        on_written: Called in the background when this rank has written its part.
    """
    return AsyncWrite(_shard_state(train_step), folder, _replica_group(), on_written)


def load_checkpoint(folder: Path, train_step: TrainStep, *, optimizer: bool) -> None:
    """Load weights that were saved under any layout into this one.

    Args:
        folder: The checkpoint.
        train_step: Model and optimizer to load into.
        optimizer: Whether to load the optimizer's state as well; otherwise it starts from zero.

    Raises:
        CheckpointError: If a file refers to anything that could run code, see `ul2r.model.restricted_reader`.
    """
    state = _shard_state(train_step, optimizer=optimizer)
    # Without the wrapper every replica would read the whole file; with it each reads a part and broadcasts it.
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(folder)), _replica_group()
    )
    with _restrict_reading(folder, is_common_wanted=optimizer) as reader:
        _check_complete(state, reader)
        loaded = dist_checkpointing.load(state, str(folder), strategy)

    load_model(train_step.chunks, loaded["model"])
    if optimizer:
        # The moments were loaded in place: the state shares memory with the optimizer. Step counts are left.
        load_optimizer_settings(train_step.optimizer, loaded["optimizer"])
    else:
        # The optimizer has weights of its own in fp32, from before the load.
        train_step.optimizer.reload_model_params()


@contextmanager
def _restrict_reading(folder: Path, *, is_common_wanted: bool) -> Iterator[RestrictedReader]:
    """Let Megatron-Core read a checkpoint with a `RestrictedReader` while the block runs.

    Args:
        folder: The checkpoint.
        is_common_wanted: Whether to read what is not sharded. Weights alone need nothing of it, and Megatron-LM's has
            all of its command line and random states.
    """
    reader = RestrictedReader(folder)
    # Read here: what torch reads below, it reads in a collective, whose errors are those of all ranks with tracebacks.
    reader.read_metadata()

    common = read_common(folder, reader) if is_common_wanted else {}

    with ExitStack() as stack:
        # Private to Megatron-Core (0.16 to 0.19): its only way to a reader. It is called several times per load.
        stack.enter_context(
            _replaced(torch_strategies, "_get_filesystem_reader", lambda *_, **__: reader)
        )
        # Megatron-Core's own call leaves it to an environment variable whether any object is unpickled.
        if hasattr(common_strategies, "TorchCommonLoadStrategy"):  # 0.16 and 0.17
            owner, name = common_strategies.TorchCommonLoadStrategy, "load_common"
        else:
            owner, name = serialization, "load_common_state_dict"
        stack.enter_context(_replaced(owner, name, lambda *_: common))
        yield reader


def _check_complete(state: dict[str, Any], reader: RestrictedReader) -> None:
    """Refuse, on all ranks, a checkpoint that lacks a tensor of any; Megatron-Core 0.19 would leave that as it is."""
    stored = reader.read_metadata().state_dict_metadata
    tensors = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    missing = [part.key for part in tensors if part.key not in stored]

    # Ranks of other pipeline stages have other tensors, and would wait for this one in the load.
    missing_of_all: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(missing_of_all, missing)
    for key in chain.from_iterable(missing_of_all):
        raise CheckpointError(f"{reader.folder} has no tensor {key}: restore an earlier checkpoint")


def read_common(folder: Path, reader: RestrictedReader) -> dict[str, Any]:
    """Read what Megatron-Core does not shard: here, the optimizer's settings."""
    file = folder / common_strategies.COMMON_STATE_FNAME
    state: dict[str, Any]
    if file.exists():
        state = load_restricted(file)
    else:
        # Megatron-Core 0.19 writes no such file, but a list of one item among the tensors.
        (state,) = reader.read_object(COMMON_OBJECT)
    return state


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:  # noqa: ANN401  any attribute of anything
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _replica_group() -> ProcessGroup:
    """Return the group of ranks that hold the same part of the model as this one."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _shard_state(train_step: TrainStep, *, optimizer: bool = True) -> dict[str, Any]:
    # Before anything is read from the weights, or written to them.
    train_step.gather_weights()
    model = make_sharded_state_dict(train_step.chunks)
    if not optimizer:
        return {"model": model}
    # Keyed by the model's tensors, which tell where each range of the optimizer belongs.
    return {"model": model, "optimizer": shard_optimizer_state(train_step.optimizer, model)}
