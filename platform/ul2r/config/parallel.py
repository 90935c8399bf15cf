"""How the workers share one model."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from ul2r.config.strict_model import PositiveInt, StrictModel


class Parallel(StrictModel):
    """How the workers share one model. Data-parallel replicas are what is left of `num_workers`."""

    num_workers: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_stages: PositiveInt = 1
    """Chunks of layers on each pipeline rank, which takes turns among them: the interleaved schedule of Narayanan
    et al. 2021, arXiv 2104.04473, 2.2.2."""
    account_for_embedding_and_loss: bool = False
    """Whether embedding and output count as a layer each when layers are shared out, so that the first and the last
    chunk have one fewer (Llama 3, arXiv 2407.21783, 3.3.2)."""
    sequence_parallel: bool = False
    """Norms and residuals cut along the row over tensor ranks (Korthikanti et al. 2022, arXiv 2205.05198, 4.2.2)."""
    context: PositiveInt = 1
    """Ranks that share a row in attention; more than one is refused."""

    @model_validator(mode="after")
    def _factors(self) -> Self:
        replica = self.tensor * self.pipeline
        if self.num_workers % replica:
            raise ValueError(
                f"num_workers={self.num_workers} is not a multiple of tensor x pipeline = {self.tensor} x {self.pipeline} "
                f"= {replica}: set parallel.num_workers to {replica}, {2 * replica}, {3 * replica}, ..."
            )
        if self.context > 1:
            raise ValueError(
                f"context={self.context}: attention by intervals, which prefix-LM needs, has no kernel that shares a "
                "row among ranks: set parallel.context to 1, and cut long rows' activations with "
                "parallel.sequence_parallel or training.recompute"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel=true cuts rows over tensor ranks, and tensor=1: raise parallel.tensor or leave "
                "parallel.sequence_parallel out"
            )
        if self.virtual_stages > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} interleaves pipeline stages, and pipeline=1: raise "
                "parallel.pipeline or leave parallel.virtual_stages out"
            )
        if self.account_for_embedding_and_loss and self.pipeline == 1:
            raise ValueError(
                "account_for_embedding_and_loss=true is about pipeline stages, and pipeline=1: raise parallel.pipeline or leave "
                "parallel.account_for_embedding_and_loss out"
            )
        return self

    @property
    def data(self) -> int:
        """Model replicas."""
        return self.num_workers // (self.tensor * self.pipeline)

    @property
    def num_chunks(self) -> int:
        """Chunks that the layers are cut into."""
        return self.pipeline * self.virtual_stages

    def layers_per_chunk(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Layers of each pipeline stage's chunks, of a model that has `layers`, which must fit."""
        ends = 1 if self.account_for_embedding_and_loss else 0
        each = (layers + 2 * ends) // self.num_chunks
        shares = [[each] * self.virtual_stages for _ in range(self.pipeline)]
        shares[0][0] -= ends
        shares[-1][-1] -= ends
        return tuple(map(tuple, shares))

    def microbatch_group_size(self, microbatches: int) -> int:
        """Microbatches that pass through a chunk before the next chunk's turn, in the interleaved schedule.

        As few as keep every stage busy: no fewer than stages, in the last group neither.
        """
        sizes = range(self.pipeline, microbatches)
        fits = (size for size in sizes if not 0 < microbatches % size < self.pipeline)
        return next(fits, microbatches)

    def check_fit(self, *, layers: int, sequence_length: int, **microbatches: int) -> None:
        """Refuse a layout that the layers, the rows or the number of microbatches do not fit.

        Args:
            layers: Layers of the model.
            sequence_length: Positions of a row.
            microbatches: Microbatches of a replica, by what needs them.

        Raises:
            ValueError: With what does not fit.
        """
        shared_out = layers + 2 if self.account_for_embedding_and_loss else layers
        if shared_out % self.num_chunks:
            raise ValueError(
                f"parallel.pipeline x parallel.virtual_stages = {self.pipeline} x {self.virtual_stages} does not "
                f"divide model.num_layers={layers}{' + 2 (parallel.account_for_embedding_and_loss)' if self.account_for_embedding_and_loss else ''}: "
                "change either"
            )
        if self.sequence_parallel and sequence_length % self.tensor:
            raise ValueError(
                f"parallel.tensor={self.tensor} does not divide objective.sequence_length={sequence_length}, as "
                "parallel.sequence_parallel needs: change either"
            )
        for what, count in microbatches.items():
            if self.virtual_stages > 1 and count < self.pipeline:
                raise ValueError(
                    f"{count} microbatches of {what} on each replica are fewer than "
                    f"parallel.pipeline={self.pipeline}, which the interleaved schedule of "
                    f"parallel.virtual_stages={self.virtual_stages} needs: raise the rows of {what}, "
                    "lower training.micro_batch_size or change the layout"
                )
