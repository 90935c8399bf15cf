"""Saving and loading of all ranks' weights and optimizer state, under any layout on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from torch.distributed import ProcessGroup

from ul2r.model.build import load_model, make_sharded_state_dict
from ul2r.model.restricted_reader import RestrictedReader, load_restricted
from ul2r.train.checkpoint.async_write import AsyncWrite
from ul2r.train.checkpoint.optimizer_state import shard_optimizer_state
from ul2r.train.optimizer import load_optimizer_settings
from ul2r.train.step import TrainStep


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
    with _restrict_reading(folder):
        common = _CommonStrategy(is_wanted=optimizer)
        loaded = dist_checkpointing.load(state, str(folder), strategy, common)

    load_model(train_step.chunks, loaded["model"])
    if optimizer:
        # The moments were loaded in place: the state shares memory with the optimizer. Step counts are left.
        load_optimizer_settings(train_step.optimizer, loaded["optimizer"])
    else:
        # The optimizer has weights of its own in fp32, from before the load.
        train_step.optimizer.reload_model_params()


class _CommonStrategy(TorchCommonLoadStrategy):  # type: ignore[misc]  # Megatron-Core has no types
    """Reading of common.pt, in which Megatron-Core puts all that is not sharded: here, the optimizer's settings.

    Args:
        is_wanted: If not, the file is not opened: weights alone need nothing of it, and Megatron-LM's has all of its
            command line and random states.
    """

    def __init__(self, *, is_wanted: bool) -> None:
        super().__init__()
        self._is_wanted = is_wanted

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Return the content of common.pt."""
        if not self._is_wanted:
            return {}
        # Megatron-Core's own call leaves it to an environment variable whether any object is unpickled.
        state: dict[str, Any] = load_restricted(Path(checkpoint_dir) / COMMON_STATE_FNAME)
        return state


@contextmanager
def _restrict_reading(folder: Path) -> Iterator[None]:
    """Let Megatron-Core read a checkpoint's tensors with a `RestrictedReader` while the block runs."""
    reader = RestrictedReader(folder)
    # Read here: what torch reads below, it reads in a collective, whose errors are those of all ranks with tracebacks.
    reader.read_metadata()

    # Private to Megatron-Core (0.16 and 0.17): its only way to a reader. It is called several times per load.
    original = torch_strategies._get_filesystem_reader
    torch_strategies._get_filesystem_reader = lambda *_, **__: reader
    try:
        yield
    finally:
        torch_strategies._get_filesystem_reader = original


def _replica_group() -> ProcessGroup:
    """Return the group of ranks that hold the same part of the model as this one."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _shard_state(train_step: TrainStep, *, optimizer: bool = True) -> dict[str, Any]:
    model = make_sharded_state_dict(train_step.chunks)
    if not optimizer:
        return {"model": model}
    # Keyed by the model's tensors, which tell where each range of the optimizer belongs.
    return {"model": model, "optimizer": shard_optimizer_state(train_step.optimizer, model)}
