"""The parallel layout: how the workers share one model."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from ul2r.config.architecture import Architecture
from ul2r.config.field_types import PositiveInt
from ul2r.config.strict_model import StrictModel


class Parallel(StrictModel):
    """Parallel sizes.

    The data-parallel size is what remains: num_workers / (tensor x pipeline).
    """

    num_workers: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_stages: PositiveInt = 1
    """Chunks of layers on each pipeline rank, run in turn: the interleaved schedule of Narayanan et al. 2021, arXiv
    2104.04473, 2.2.2."""
    account_for_embedding_and_loss: bool = False
    """Count embedding and output as a layer each when layers are divided into chunks, so that the first and
    the last chunk have one layer fewer (Llama 3, arXiv 2407.21783, 3.3.2)."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over tensor ranks (Korthikanti et al. 2022, arXiv 2205.05198,
    4.2.2)."""
    overlap_param_gather: bool = False
    """Gather the weights that other replicas have updated during the next forward pass, layer by layer as they are
    needed, instead of after the update."""
    bucket_size: PositiveInt | None = None
    """Parameters of a bucket: gradients are reduced over replicas, and weights gathered, a bucket at a time. None is
    Megatron-Core's size, 40 million or a million for each replica if that is more; pipeline stages after the first have
    one bucket."""
    context: PositiveInt = 1
    """Context-parallel size; values above 1 are refused."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        # Whole replicas only: what remains of the workers after tensor and pipeline is the data-parallel size.
        replica = self.tensor * self.pipeline
        if self.num_workers % replica:
            raise ValueError(
                f"num_workers={self.num_workers} is not a multiple of tensor x pipeline = "
                f"{self.tensor} x {self.pipeline} = {replica}: "
                f"set parallel.num_workers to {replica}, {2 * replica}, {3 * replica}, ..."
            )
        # The key exists to be refused with a reason, not just as unknown.
        if self.context > 1:
            raise ValueError(
                f"context={self.context}: interval attention, which prefix-LM needs, has no kernel that splits a row "
                "over ranks: set parallel.context to 1, and reduce the activations of long rows with "
                "parallel.sequence_parallel or training.recompute"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel=true splits rows over tensor ranks, and tensor=1: raise parallel.tensor or set "
                "parallel.sequence_parallel to false"
            )
        if self.virtual_stages > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} interleaves pipeline stages, and pipeline=1: raise "
                "parallel.pipeline or set parallel.virtual_stages to 1"
            )
        if self.account_for_embedding_and_loss and self.pipeline == 1:
            raise ValueError(
                "account_for_embedding_and_loss=true divides layers among pipeline stages, and pipeline=1: raise "
                "parallel.pipeline or set parallel.account_for_embedding_and_loss to false"
            )
        return self

    @property
    def data(self) -> int:
        """Data-parallel size: the number of model replicas."""
        return self.num_workers // (self.tensor * self.pipeline)

    @property
    def num_chunks(self) -> int:
        """Chunks that the layers are divided into."""
        return self.pipeline * self.virtual_stages

    def layers_per_chunk(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the number of layers of each pipeline stage's chunks, for a model that passed `check_layers`."""
        # Example: 30 layers on 4 stages that account for both ends are (30 + 2) / 4 = 8 in each, so 7, 8, 8 and 7.
        ends = 1 if self.account_for_embedding_and_loss else 0
        each = (num_layers + 2 * ends) // self.num_chunks
        stages = [[each] * self.virtual_stages for _ in range(self.pipeline)]
        stages[0][0] -= ends
        stages[-1][-1] -= ends
        return tuple(map(tuple, stages))

    def microbatch_group_size(self, num_microbatches: int) -> int:
        """Return the microbatches that pass through a chunk before the next chunk's turn, in the interleaved schedule.

        The smallest group that keeps every stage busy: no group, not even the last one, is smaller than the number of
        stages.
        """
        # A remainder smaller than the number of stages would be a last group that cannot fill the pipeline.
        # Example: 10 microbatches on 4 stages. A size of 4 would leave a last group of 2, so 5. With 8 it is 4.
        sizes = range(self.pipeline, num_microbatches)
        fitting = (size for size in sizes if not 0 < num_microbatches % size < self.pipeline)
        return next(fitting, num_microbatches)

    def num_live_microbatches(self, num_microbatches: int) -> int:
        """Return the most microbatches that a rank has begun and not finished at any time of a step.

        Stage s of p begins p - s before its first backward pass. In the interleaved schedule the first microbatch of a
        group passes through the first chunk, of which its backward pass is the last, before a third group begins.
        """
        if self.virtual_stages == 1:
            return self.pipeline
        return 2 * self.microbatch_group_size(num_microbatches)


def check_tensor_parallel(parallel: Parallel, model: Architecture) -> None:
    """Refuse a tensor-parallel size that the model's heads, MLP, norms or experts do not allow.

    Raises:
        ValueError: With the sizes that do not fit.
    """
    tensor = parallel.tensor
    for key, size in (("num_heads", model.num_heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if size % tensor:
            divisors = [d for d in range(1, size + 1) if size % d == 0 and d <= 16]
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.{key}={size}: "
                f"set parallel.tensor to one of {', '.join(map(str, divisors))}"
            )

    # With more ranks than key/value heads Megatron-Core gives each head to several ranks, which needs a whole number.
    if model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        raise ValueError(
            f"parallel.tensor={tensor} neither divides model.num_kv_heads={model.num_kv_heads} nor is a multiple of "
            "it: change either"
        )
    # Its norm sums squares over the heads of all ranks: a head on two ranks would count twice.
    if model.qk_norm == "full" and model.num_kv_heads % tensor:
        raise ValueError(
            f"parallel.tensor={tensor} does not divide model.num_kv_heads={model.num_kv_heads}, as "
            "model.qk_norm=full needs: change either"
        )
    if model.num_experts is not None and tensor > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tensor={tensor} with model.num_experts={model.num_experts}: Megatron-Core supports experts "
            "under tensor parallelism only with sequence parallelism: set parallel.sequence_parallel to true"
        )


def check_layers(parallel: Parallel, num_layers: int) -> None:
    """Refuse layers that cannot be divided evenly into pipeline chunks.

    Raises:
        ValueError: With the number of layers and of chunks.
    """
    # All chunks are equally long in Megatron-Core's layouts, the ends included if they count as layers.
    ends = 2 if parallel.account_for_embedding_and_loss else 0
    if (num_layers + ends) % parallel.num_chunks:
        counted = " + 2 (parallel.account_for_embedding_and_loss)" if ends else ""
        raise ValueError(
            f"parallel.pipeline x parallel.virtual_stages = {parallel.pipeline} x {parallel.virtual_stages} does not "
            f"divide model.num_layers={num_layers}{counted}: change either"
        )


def check_sequence_parallel(parallel: Parallel, sequence_length: int) -> None:
    """Refuse rows that cannot be split evenly over tensor ranks.

    Raises:
        ValueError: With the length and the number of ranks.
    """
    if parallel.sequence_parallel and sequence_length % parallel.tensor:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} does not divide objective.sequence_length={sequence_length}, as "
            "parallel.sequence_parallel needs: change either"
        )


def check_interleaving(parallel: Parallel, **num_microbatches: int) -> None:
    """Refuse fewer microbatches than the interleaved pipeline schedule needs.

    Args:
        parallel: The layout.
        num_microbatches: Microbatches of a replica, by what they are for ("training", "validation").

    Raises:
        ValueError: With the number of microbatches and of stages.
    """
    for purpose, count in num_microbatches.items():
        if parallel.virtual_stages > 1 and count < parallel.pipeline:
            raise ValueError(
                f"{count} microbatches of {purpose} on each replica are fewer than "
                f"parallel.pipeline={parallel.pipeline}, which the interleaved schedule of "
                f"parallel.virtual_stages={parallel.virtual_stages} needs: raise the rows of {purpose}, "
                "lower training.micro_batch_size or change the layout"
            )
