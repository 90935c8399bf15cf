"""Position of a rank in the device mesh, and the collectives that the train loop uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ul2r.config import Parallel
from ul2r.errors import LayoutError, UserError
from ul2r.model.cpu import use_cpu
from ul2r.objective.batch import Batch

T = TypeVar("T")

ROW_FIELDS = ("tokens", "labels", "loss_mask", "kv_start", "kv_end", "position_ids", "denoiser_ids")
"""Arrays of a batch with one value per row position; `sample_ids` has one per slot."""


@dataclass(frozen=True)
class Mesh:
    """Position of this rank among tensor, pipeline and data-parallel ranks.

    Attributes:
        parallel: Sizes of the mesh.
        data_rank: Data-parallel rank: which replica of the model this rank is part of.
        device: Device of this rank.
    """

    parallel: Parallel
    data_rank: int
    device: torch.device

    @classmethod
    def join(cls, parallel: Parallel, timeout_s: float = 1800.0) -> Mesh:
        """Set up Megatron-Core's groups over the initialized default process group.

        Args:
            parallel: Sizes of the mesh.
            timeout_s: Timeout of collectives in these groups.

        Raises:
            LayoutError: If the process group has another size than `parallel.num_workers`.
        """
        # Megatron-Core asks torch.cuda for its device; without a GPU the CPU takes that place (`model/cpu.py`).
        if not torch.cuda.is_available():
            use_cpu()
        if dist.get_world_size() != parallel.num_workers:
            raise LayoutError(
                f"{dist.get_world_size()} workers were started, parallel.num_workers={parallel.num_workers} "
                f"(tensor={parallel.tensor} x pipeline={parallel.pipeline} x data={parallel.data}): start "
                f"{parallel.num_workers}"
            )

        # The number of replicas is not an argument: Megatron-Core divides the world size by the two that are.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            # None rather than 1, since any number selects the interleaved schedule.
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_stages if parallel.virtual_stages > 1 else None
            ),
            # Not the default group's: Megatron-Core gives its groups a timeout of their own, 30 minutes by default.
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
        # Megatron-Core requires a seed. Nothing here draws from it: initial weights depend on the recipe's seed and
        # the names of the tensors.
        model_parallel_cuda_manual_seed(0)

        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        return cls(parallel, parallel_state.get_data_parallel_rank(), device)

    def leave(self) -> None:
        """Destroy Megatron-Core's groups; the default process group stays."""
        parallel_state.destroy_model_parallel()

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def is_rank0(self) -> bool:
        """True on global rank 0, which logs and finishes checkpoints."""
        return dist.get_rank() == 0

    @property
    def is_reader(self) -> bool:
        """True on the first tensor and pipeline rank of each replica, which reads the replica's data."""
        return dist.get_rank() == self._reader

    @property
    def is_last_stage(self) -> bool:
        """True on the last pipeline stage, which computes the loss."""
        return bool(parallel_state.is_pipeline_last_stage())

    @property
    def _reader(self) -> int:
        # Megatron-Core numbers a replica's ranks by tensor, then by pipeline rank: the lowest is the first in both.
        return min(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))

    def broadcast_from_rank0(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on every rank.

        Args:
            function: Called on rank 0 only; its result must be picklable.

        Raises:
            UserError: On every rank, if `function` raises it on rank 0.
        """
        outcome: list[Any] = [None, None]
        if self.is_rank0:
            try:
                outcome[0] = function()
            # Only these: they are the user's to fix and need no stack. Any other ends rank 0, and thereby the
            # run.
            except UserError as error:
                outcome[1] = error
        # On this rank's device, since NCCL sends from GPU memory only.
        dist.broadcast_object_list(outcome, src=0, device=self.device)

        result, failure = outcome
        if failure is not None:
            raise failure
        value: T = result
        return value

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order; values must be picklable."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum over all ranks of each number, in one message."""
        values = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [int(number) for number in values.tolist()]

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the last stage's values over the data-parallel ranks, and return the sums on every rank.

        Args:
            values: (N,) float64, overwritten; those of other stages are ignored.
        """
        # Stages before the last have no losses to add. They get the sums afterwards, within each replica's pipeline.
        if self.is_last_stage:
            dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        if self.parallel.pipeline > 1:
            dist.broadcast(
                values,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return values

    def broadcast_batch(self, batch: Batch | None) -> Batch | None:
        """Broadcast the reader's batch to the other ranks of its replica.

        Args:
            batch: On the reader its batch, or None after the last one; None on other ranks.

        Returns:
            The same batch on every rank of the replica, None after the last one.
        """
        if self.parallel.tensor * self.parallel.pipeline == 1:
            return batch

        # Two messages: receivers must know the size of the second, and whether there is a batch at all.
        group = parallel_state.get_model_parallel_group()
        shape = torch.zeros(3, dtype=torch.int64, device=self.device)  # zeros: no batch
        if batch is not None:
            num_slots = batch.sample_ids.shape[1]
            shape = torch.tensor([*batch.tokens.shape, num_slots], device=self.device)
        dist.broadcast(shape, src=self._reader, group=group)
        num_rows, length, num_slots = (int(number) for number in shape.tolist())
        if num_rows == 0:
            return None

        size = num_rows * (len(ROW_FIELDS) * length + num_slots)
        # All arrays hold integers, and int64 takes each of them without loss: one message instead of one per array.
        packed = torch.empty(size, dtype=torch.int64, device=self.device)
        if batch is not None:
            packed.copy_(torch.from_numpy(_pack(batch)))
        dist.broadcast(packed, src=self._reader, group=group)
        if batch is not None:
            return batch
        return _unpack(packed.cpu().numpy(), num_rows, length, num_slots)


def _pack(batch: Batch) -> np.ndarray:
    """Return all arrays of a batch as one int64 vector."""
    arrays = batch.to_arrays()
    parts = [arrays[name] for name in (*ROW_FIELDS, "sample_ids")]
    return np.concatenate([part.astype(np.int64).ravel() for part in parts])


def _unpack(packed: np.ndarray, num_rows: int, length: int, num_slots: int) -> Batch:
    """Return the batch that `_pack` made a vector of."""
    fields, sample_ids = np.split(packed, [num_rows * length * len(ROW_FIELDS)])
    arrays: dict[str, np.ndarray] = {
        name: part.reshape(num_rows, length).astype(np.int32)
        for name, part in zip(ROW_FIELDS, np.split(fields, len(ROW_FIELDS)), strict=True)
    }
    arrays["loss_mask"] = arrays["loss_mask"].astype(np.uint8)
    arrays["denoiser_ids"] = arrays["denoiser_ids"].astype(np.int8)
    return Batch.from_arrays(arrays | {"sample_ids": sample_ids.reshape(num_rows, num_slots)})
