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
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ul2r.config import Recipe
from ul2r.model.attention import pack_intervals
from ul2r.model.build import build_model
from ul2r.model.experts import set_num_targets
from ul2r.model.flops import num_visible_keys
from ul2r.objective.batch import Batch
from ul2r.train.mesh import Mesh
from ul2r.train.optimizer import LearningRateSchedule, build_optimizer

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Losses:
    """Loss sums of a batch over all replicas, known to every rank.

    Attributes:
        sums: (denoisers,) float64, nats summed over target tokens.
        targets: (denoisers,) float64, target tokens.
        positions: Row positions computed.
        num_visible_keys: Keys that those positions see, summed over layers.
    """

    sums: np.ndarray
    targets: np.ndarray
    positions: float
    num_visible_keys: float

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
    """Model, optimizer and schedule of this rank, driven a batch at a time.

    Attributes:
        chunks: This rank's parts of the model, one for each virtual stage.
        model: The same as Megatron-Core trains them.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, vocabulary_size: int) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.chunks = build_model(recipe, vocabulary_size)
        self.config = self.chunks[0].config
        self.model = [self._wrap(chunk) for chunk in self.chunks]
        self.optimizer = build_optimizer(recipe, self.model)
        self.schedule = LearningRateSchedule(recipe, self.optimizer)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        # Replicas add gradients up while the last microbatch's backward pass goes on, and not before that.
        unsynchronised = [chunk.no_sync for chunk in self.model]
        self.config.no_sync_func = unsynchronised if len(self.model) > 1 else unsynchronised[0]

    def _wrap(self, chunk: GPTModel) -> DistributedDataParallel:
        return DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
            ),
            module=Float16Module(self.config, chunk) if self.config.bf16 else chunk,
        )

    def train(
        self, step: int, rows: Batch, admit: Callable[[StepResult], bool] = lambda _: True
    ) -> StepResult:
        """Take optimizer step `step` (from 0) on this replica's rows.

        The loss is the sum over target tokens divided by their global number, so that it depends
        neither on microbatches nor on replicas.

        Args:
            step: Which step.
            rows: The rows.
            admit: Asked before the update is applied; where it says no, weights and optimizer stay as they are.
        """
        self.schedule.set(step)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.recipe.model.num_experts is not None:
            set_num_targets(self.chunks, self._mean_targets(rows))
        losses = self._run(rows, len(self.recipe.objective.mixture), forward_only=False)
        # `step` does both again and then applies what it finds, nan too; both leave the gradients as they are.
        self.optimizer.prepare_grads()
        gradient_norm = float(self.optimizer.get_grad_norm())
        result = StepResult(losses, gradient_norm, self.optimizer.param_groups[0]["lr"])
        if admit(result):
            self.optimizer.step()
        return result

    def _mean_targets(self, rows: Batch) -> float:
        """Target tokens of a microbatch, on average over the step's on all replicas."""
        here = torch.tensor([rows.loss_mask.sum()], dtype=torch.float64, device=self.mesh.device)
        microbatches = self.recipe.num_microbatches * self.recipe.parallel.data
        return float(self.mesh.all_reduce_sum(here)) / microbatches

    @torch.no_grad()
    def measure(self, rows: Batch) -> Losses:
        """Losses on this replica's share of held-out rows of one denoiser; nothing is learned."""
        return self._run(rows, 1, forward_only=True)

    def _run(self, rows: Batch, denoisers: int, *, forward_only: bool) -> Losses:
        """Pass all rows through the pipeline, microbatch by microbatch."""
        size = self.recipe.training.micro_batch_size
        assert len(rows) % size == 0
        microbatches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.config.microbatch_group_size_per_vp_stage = self.recipe.parallel.microbatch_group_size(
            len(microbatches)
        )
        results = get_forward_backward_func()(
            forward_step_func=partial(self._forward, denoisers=denoisers),
            data_iterator=[iter(microbatches) for _ in self.model],  # each chunk reads them all
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=rows.tokens.shape[1],
            micro_batch_size=size,
            forward_only=forward_only,
        )
        values = torch.zeros(2 * denoisers + 2, dtype=torch.float64, device=self.mesh.device)
        for result in results:
            values[:-2] += result["losses"]
        values[-2] = rows.tokens.size
        values[-1] = num_visible_keys(self.recipe.model, rows.kv_start, rows.kv_end)
        total = self.mesh.all_reduce_sum(values).cpu().numpy()
        return Losses(
            sums=total[:denoisers],
            targets=total[denoisers:-2],
            positions=float(total[-2]),
            num_visible_keys=float(total[-1]),
        )

    def _forward(
        self, microbatches: Iterator[Batch], model: torch.nn.Module, *, denoisers: int
    ) -> tuple[Tensor, LossFunction]:
        """Megatron's forward step: this stage's output and how to make it a loss."""
        rows = next(microbatches)
        device = self.mesh.device
        output = model(
            _tensor(rows.tokens, device).long(),
            _tensor(rows.position_ids, device).long(),
            pack_intervals(rows.kv_start, rows.kv_end),
            labels=_tensor(rows.labels, device).long(),
        )
        z_loss = self.recipe.optimizer.z_loss
        return output, partial(_loss, rows=rows, denoisers=denoisers, z_loss=z_loss)


def _loss(
    output: Tensor, *, rows: Batch, denoisers: int, z_loss: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum a microbatch's losses over targets, in all and for each denoiser.

    Args:
        output: (B, S) nats, or with z-loss (2, B, S): nats, and the softmax's log Z.
        rows: The microbatch.
        denoisers: Number of denoisers in the mixture.
        z_loss: Weight of log^2 Z in the loss sum; the losses by denoiser are without it.

    Returns:
        Loss sum, number of targets, and "losses": (2 * denoisers,) float64 of sums, then counts.
    """
    device = output.device
    token_losses, *log_z = output.unbind() if z_loss else (output,)
    targets = _tensor(rows.loss_mask, device).float()
    masked = token_losses.float() * targets
    which = torch.clamp(
        _tensor(rows.denoiser_ids, device).long(), min=0
    ).ravel()  # padding has no target
    sums = torch.zeros(2, denoisers, dtype=torch.float64, device=device)
    sums[0].index_add_(0, which, masked.detach().double().ravel())
    sums[1].index_add_(0, which, targets.double().ravel())
    total = masked.sum()
    for one in log_z:
        total = total + z_loss * (one.float().square() * targets).sum()
    return total, targets.sum().int(), {"losses": sums.ravel()}


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
