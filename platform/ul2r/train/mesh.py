"""Which part of the model and of the batch this worker has."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Mesh:
    """This worker's place among tensor, pipeline and data-parallel ranks."""

    parallel: Parallel
    data_rank: int
    device: torch.device

    @classmethod
    def join(cls, parallel: Parallel) -> Mesh:
        """Set up Megatron's groups over the initialized default process group.

        Raises:
            LayoutError: If the process group has another size than `parallel.num_workers`.
        """
        if not torch.cuda.is_available():
            use_cpu()
        if dist.get_world_size() != parallel.num_workers:
            raise LayoutError(
                f"{dist.get_world_size()} workers were started for parallel.num_workers={parallel.num_workers} "
                f"(tensor={parallel.tensor}, pipeline={parallel.pipeline}, data={parallel.data}): start as many"
            )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_stages if parallel.virtual_stages > 1 else None
            ),
        )
        model_parallel_cuda_manual_seed(0)  # Megatron asks for one; nothing here draws from it
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        return cls(parallel, parallel_state.get_data_parallel_rank(), device)

    def leave(self) -> None:
        """Give the groups back; the default process group stays."""
        parallel_state.destroy_model_parallel()

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def is_reader(self) -> bool:
        """Whether this rank consumes the replica's data: its first tensor and pipeline rank."""
        return dist.get_rank() == self._reader

    @property
    def is_rank0(self) -> bool:
        """Whether this is global rank 0, the one that logs and switches checkpoints."""
        return dist.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return bool(parallel_state.is_pipeline_last_stage())

    @property
    def _reader(self) -> int:
        return min(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))

    def broadcast_from_rank0(self, find: Callable[[], T]) -> T:
        """What `find` returns on rank 0, given to every rank, so that all act on the same.

        Args:
            find: Called on rank 0 only; its result must be picklable.

        Raises:
            UserError: On every rank, if `find` raises it.
        """
        found: list[Any] = [None, None]
        if self.is_rank0:
            try:
                found[0] = find()
            except UserError as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, device=self.device)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def all_gather(self, mine: T) -> list[T]:
        """What every rank has, by rank; it must be picklable."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The highest of each number over all ranks."""
        values = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [int(number) for number in values.tolist()]

    def broadcast_batch(self, rows: Batch | None) -> Batch | None:
        """Hand the reader's rows to its model-parallel peers by one broadcast.

        Args:
            rows: The rows on the reader, None on the others and, everywhere, at the end of the data.

        Returns:
            The same rows on every rank of the replica, or None at the end of the data.
        """
        if self.parallel.tensor * self.parallel.pipeline == 1:
            return rows
        group = parallel_state.get_model_parallel_group()
        shape = torch.zeros(3, dtype=torch.int64, device=self.device)
        if rows is not None:
            shape = torch.tensor([*rows.tokens.shape, rows.sample_ids.shape[1]], device=self.device)
        dist.broadcast(shape, src=self._reader, group=group)
        size, length, slots = (int(number) for number in shape.tolist())
        if size == 0:
            return None
        packed = torch.empty(size * (7 * length + slots), dtype=torch.int64, device=self.device)
        if rows is not None:
            packed.copy_(torch.from_numpy(_pack(rows)))
        dist.broadcast(packed, src=self._reader, group=group)
        return rows if rows is not None else _unpack(packed.cpu().numpy(), size, length, slots)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add the last stage's `values` over the data-parallel ranks and give the sum to every rank.

        Args:
            values: (N,) float64; what other stages pass is ignored.
        """
        if self.is_last_stage:
            dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        if self.parallel.pipeline > 1:
            dist.broadcast(
                values,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return values


ROW_FIELDS = ("tokens", "labels", "loss_mask", "kv_start", "kv_end", "position_ids", "denoiser_ids")


def _pack(rows: Batch) -> np.ndarray:
    arrays = rows.to_arrays()
    parts = [arrays[name] for name in (*ROW_FIELDS, "sample_ids")]
    return np.concatenate([part.astype(np.int64).ravel() for part in parts])


def _unpack(packed: np.ndarray, size: int, length: int, slots: int) -> Batch:
    fields, sample = np.split(packed, [size * length * len(ROW_FIELDS)])
    arrays: dict[str, np.ndarray] = {
        name: part.reshape(size, length).astype(np.int32)
        for name, part in zip(ROW_FIELDS, np.split(fields, len(ROW_FIELDS)), strict=True)
    }
    arrays["loss_mask"] = arrays["loss_mask"].astype(np.uint8)
    arrays["denoiser_ids"] = arrays["denoiser_ids"].astype(np.int8)
    return Batch.from_arrays(arrays | {"sample_ids": sample.reshape(size, slots)})
