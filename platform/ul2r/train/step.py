"""One optimizer step, and one held-out measurement, on Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ul2r.config import Recipe
from ul2r.model.attention import interval_mask
from ul2r.model.build import build_model
from ul2r.objective.rows import Rows
from ul2r.train.mesh import Mesh
from ul2r.train.optimizer import Schedule, build_optimizer

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Losses:
    """Loss sums of a batch over all replicas, known to every rank.

    Attributes:
        sums: (denoisers,) float64, nats summed over target tokens.
        targets: (denoisers,) float64, target tokens.
        positions: Row positions computed.
        seen_keys: Sum of hi - lo over those positions.
    """

    sums: np.ndarray
    targets: np.ndarray
    positions: float
    seen_keys: float

    @property
    def mean(self) -> float:
        """Nats per target token."""
        return float(self.sums.sum() / self.targets.sum())

    def by_denoiser(self, names: tuple[str, ...]) -> Mapping[str, float]:
        """Nats per target token of each denoiser that had any."""
        return {
            name: float(total / count)
            for name, total, count in zip(names, self.sums, self.targets, strict=True)
            if count
        }


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    losses: Losses
    gradient_norm: float
    learning_rate: float


class TrainStep:
    """Model, optimizer and schedule of this rank, driven a batch at a time."""

    def __init__(self, recipe: Recipe, mesh: Mesh, vocabulary_size: int) -> None:
        self.recipe, self.mesh = recipe, mesh
        model = build_model(
            recipe.model,
            recipe.parallel,
            vocabulary_size,
            recipe.objective.sequence_length,
            recipe.seed if recipe.base is None else None,
        )
        self.config = model.config
        wrapped = Float16Module(self.config, model) if self.config.bf16 else model
        self.model = DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True
            ),
            module=wrapped,
        )
        self.unwrapped = model
        self.optimizer = build_optimizer(recipe, self.model)
        self.schedule = Schedule(recipe, self.optimizer)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    def train(self, step: int, rows: Rows) -> StepResult:
        """Take optimizer step `step` (from 0) on this replica's rows.

        The loss is the sum over target tokens divided by their global number, so that it depends
        neither on microbatches nor on replicas.
        """
        self.schedule.set(step)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(rows, len(self.recipe.objective.mixture), forward_only=False)
        _, gradient_norm, _ = self.optimizer.step()
        return StepResult(losses, float(gradient_norm), self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def measure(self, rows: Rows) -> Losses:
        """Losses on this replica's share of held-out rows of one denoiser; nothing is learned."""
        return self._run(rows, 1, forward_only=True)

    def _run(self, rows: Rows, denoisers: int, *, forward_only: bool) -> Losses:
        """Pass all rows through the pipeline, microbatch by microbatch."""
        size = self.recipe.training.microbatch_rows
        assert len(rows) % size == 0
        microbatches = (rows[start : start + size] for start in range(0, len(rows), size))
        results = get_forward_backward_func()(
            forward_step_func=partial(self._forward, denoisers=denoisers),
            data_iterator=microbatches,
            model=[self.model],
            num_microbatches=len(rows) // size,
            seq_length=rows.tokens.shape[1],
            micro_batch_size=size,
            forward_only=forward_only,
        )
        values = torch.zeros(2 * denoisers + 2, dtype=torch.float64, device=self.mesh.device)
        for result in results:
            values[:-2] += result["losses"]
        values[-2] = rows.tokens.size
        values[-1] = int((rows.hi - rows.lo).sum())
        total = self.mesh.sum_over_replicas(values).cpu().numpy()
        return Losses(
            sums=total[:denoisers],
            targets=total[denoisers:-2],
            positions=float(total[-2]),
            seen_keys=float(total[-1]),
        )

    def _forward(
        self, microbatches: Iterator[Rows], model: torch.nn.Module, *, denoisers: int
    ) -> tuple[Tensor, LossFunction]:
        """Megatron's forward step: this stage's output and how to make it a loss."""
        rows = next(microbatches)
        device = self.mesh.device
        mask = interval_mask(_tensor(rows.lo, device), _tensor(rows.hi, device))
        output = model(
            _tensor(rows.tokens, device).long(),
            _tensor(rows.position, device).long(),
            mask,
            labels=_tensor(rows.labels, device).long(),
        )
        return output, partial(_loss, rows=rows, denoisers=denoisers)


def _loss(
    token_losses: Tensor, *, rows: Rows, denoisers: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum a microbatch's losses over targets, in all and for each denoiser.

    Args:
        token_losses: (B, S) nats.
        rows: The microbatch.
        denoisers: Number of denoisers in the mixture.

    Returns:
        Loss sum, number of targets, and "losses": (2 * denoisers,) float64 of sums, then counts.
    """
    device = token_losses.device
    targets = _tensor(rows.loss_mask, device).float()
    masked = token_losses.float() * targets
    which = torch.clamp(
        _tensor(rows.denoiser, device).long(), min=0
    ).ravel()  # padding has no target
    sums = torch.zeros(2, denoisers, dtype=torch.float64, device=device)
    sums[0].index_add_(0, which, masked.detach().double().ravel())
    sums[1].index_add_(0, which, targets.double().ravel())
    return masked.sum(), targets.sum().int(), {"losses": sums.ravel()}


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
