"""How the workers share one model."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from ul2r.config.section import PositiveInt, Section


class Parallel(Section):
    """How the workers share one model. Data-parallel replicas are what is left of `workers`."""

    workers: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_stages: PositiveInt = 1
    """Chunks of layers on each pipeline rank, which takes turns among them: the interleaved schedule of Narayanan
    et al. 2021, arXiv 2104.04473, 2.2.2."""
    sequence_parallel: bool = False
    """Norms and residuals cut along the row over tensor ranks (Korthikanti et al. 2022, arXiv 2205.05198, 4.2.2)."""
    context: PositiveInt = 1
    """Ranks that share a row in attention; more than one is refused."""

    @model_validator(mode="after")
    def _factors(self) -> Self:
        replica = self.tensor * self.pipeline
        if self.workers % replica:
            raise ValueError(
                f"workers={self.workers} is not a multiple of tensor x pipeline = {self.tensor} x {self.pipeline} "
                f"= {replica}: set parallel.workers to {replica}, {2 * replica}, {3 * replica}, ..."
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
        return self

    @property
    def data(self) -> int:
        """Model replicas."""
        return self.workers // (self.tensor * self.pipeline)

    @property
    def chunks(self) -> int:
        """Chunks that the layers are cut into."""
        return self.pipeline * self.virtual_stages

    def check_fit(self, *, layers: int, sequence_length: int, **microbatches: int) -> None:
        """Refuse a layout that the layers, the rows or the number of microbatches do not fit.

        Args:
            layers: Layers of the model.
            sequence_length: Positions of a row.
            microbatches: Microbatches of a replica, by what needs them.

        Raises:
            ValueError: With what does not fit.
        """
        if layers % self.chunks:
            raise ValueError(
                f"parallel.pipeline x parallel.virtual_stages = {self.pipeline} x {self.virtual_stages} "
                f"does not divide model.layers={layers}: change either"
            )
        if self.sequence_parallel and sequence_length % self.tensor:
            raise ValueError(
                f"parallel.tensor={self.tensor} does not divide objective.sequence_length={sequence_length}, as "
                "parallel.sequence_parallel needs: change either"
            )
        for what, count in microbatches.items():
            if self.virtual_stages > 1 and count % self.pipeline:
                raise ValueError(
                    f"{count} microbatches of {what} on each replica are no multiple of "
                    f"parallel.pipeline={self.pipeline}, as the interleaved schedule of "
                    f"parallel.virtual_stages={self.virtual_stages} needs: change the rows of {what}, "
                    "training.microbatch_rows or the layout"
                )
