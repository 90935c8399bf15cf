"""Forward, backward and optimizer step of one rank, on Megatron-Core's schedules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ul2r.config import Recipe
from ul2r.model.attention.core import needs_host_intervals
from ul2r.model.build import build_model
from ul2r.model.experts import set_num_targets
from ul2r.model.flops import num_visible_keys, training_flops
from ul2r.model.kernels import KernelPlan, find_obstacles, plan_kernels
from ul2r.objective.batch import Batch
from ul2r.objective.vocabulary import Vocabulary
from ul2r.train.mesh import Mesh
from ul2r.train.monitor.guards import StepStats
from ul2r.train.optimizer import (
    LearningRateSchedule,
    build_optimizer,
    scale_rows,
    unwrap_chained_optimizer,
)
from ul2r.train.transfer import DeviceBatch, send_batch

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Losses:
    """Loss sums of a batch over all replicas, the same on every rank.

    Attributes:
        sums: (denoisers,) float64, nats summed over target tokens.
        targets: (denoisers,) float64, number of target tokens.
        positions: Number of row positions.
        num_visible_keys: Keys that the queries at those positions attend to, summed over layers.
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
        """Return the nats per target token of each denoiser that has any."""
        return {
            name: float(total / count)
            for name, total, count in zip(names, self.sums, self.targets, strict=True)
            if count
        }


@dataclass(frozen=True)
class StepResult:
    """Losses and gradient norm of a training step, the same on every rank.

    Attributes:
        losses: Losses before the update.
        gradient_norm: L2 norm of the global gradient before clipping.
        learning_rate: Learning rate of the step.
        flops: Model FLOPs of the forward and backward pass.
    """

    losses: Losses
    gradient_norm: float
    learning_rate: float
    flops: float

    @property
    def stats(self) -> StepStats:
        """The numbers that the guards look at."""
        sums = tuple(self.losses.sums.tolist())
        targets = tuple(self.losses.targets.tolist())
        return StepStats(sums, targets, self.gradient_norm)


class TrainStep:
    """Model, optimizer and learning-rate schedule of this rank.

    A training step is `forward_backward`, then `optimizer_step`; without the latter, weights and optimizer state stay
    as they are.

    Attributes:
        kernels: Kernels that compute a step, the same on every rank.
        chunks: This rank's parts of the model, one per virtual pipeline stage.
        model: The same parts wrapped for Megatron-Core's data parallelism.
        optimizer: Megatron-Core's optimizer.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, vocabulary_size: int) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.vocabulary_size = vocabulary_size
        # First: a kernel that cannot be had ends the run before anything is built.
        self.kernels = _choose_kernels(recipe, mesh)
        self.chunks = build_model(recipe, vocabulary_size, self.kernels)
        # The chunks share one config object: what is set below holds for all of them.
        self.config = self.chunks[0].config
        self.model = [self._wrap(chunk) for chunk in self.chunks]
        self.optimizer = build_optimizer(recipe, self.model, self.kernels)
        self.schedule = LearningRateSchedule(recipe, self.optimizer)
        self._gradient_norm = math.nan
        self._must_gather_weights = False

        # Megatron-Core's schedules take these from the model's config.
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        # Gradients are reduced over replicas during the backward pass of the last microbatch only.
        no_sync = [chunk.no_sync for chunk in self.model]
        self.config.no_sync_func = no_sync if len(self.model) > 1 else no_sync[0]

    @classmethod
    def for_vocabulary(cls, recipe: Recipe, mesh: Mesh, vocabulary: Vocabulary) -> Self:
        """Build them for a vocabulary whose modes and sentinels may have a learning rate of their own."""
        step = cls(recipe, mesh, vocabulary.size)
        factor = recipe.optimizer.special_token_lr_factor
        if factor != 1:
            distributed = unwrap_chained_optimizer(step.optimizer)
            scale_rows(distributed, step.chunks, vocabulary.non_text_ids, factor)
        return step

    def _wrap(self, chunk: GPTModel) -> DistributedDataParallel:
        """Wrap a chunk for gradient reduction in fp32, overlapped with the backward pass."""
        parallel = self.recipe.parallel
        return DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                overlap_param_gather=parallel.overlap_param_gather,
                bucket_size=parallel.bucket_size,
            ),
            module=Float16Module(self.config, chunk) if self.config.bf16 else chunk,
        )

    def forward_backward(self, step: int, batch: Batch) -> StepResult:
        """Compute losses and gradients of a training step; collective over all ranks.

        The loss is the sum over target tokens divided by their global number, so that it depends neither on
        microbatches nor on replicas.

        Args:
            step: Number of the step, from 0; decides the learning rate.
            batch: This replica's rows.
        """
        self.schedule.set(step)
        # Both, as in Megatron-Core's own loop: gradients are in DDP's buffers, the optimizer has copies of its shard.
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Before the forward pass: the routers' auxiliary loss is scaled by it.
        if self.recipe.model.num_experts is not None:
            set_num_targets(self.chunks, self._mean_targets(batch))

        num_denoisers = len(self.recipe.objective.mixture)
        losses = self._run(batch, num_denoisers, forward_only=False)
        # Modules gathered their weights before they used them.
        self._must_gather_weights = False

        # The first part of `optimizer.step`, which would go on and apply the gradients even if they are NaN. Neither
        # call changes them, so that a caller may look at the norm first and leave the step out.
        self.optimizer.prepare_grads()
        self._gradient_norm = float(self.optimizer.get_grad_norm())

        flops = training_flops(
            self.recipe.model,
            self.vocabulary_size,
            losses.positions,
            losses.num_visible_keys,
            float(losses.targets.sum()),
        )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        return StepResult(losses, self._gradient_norm, learning_rate, flops)

    def optimizer_step(self) -> None:
        """Clip the gradients of the last `forward_backward` and apply them; collective over all ranks."""
        # The second part of `optimizer.step`.
        max_norm = self.recipe.optimizer.max_grad_norm
        parameters = unwrap_chained_optimizer(self.optimizer).get_parameters()
        if max_norm > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm, self._gradient_norm)
        self.optimizer.step_with_ready_grads()
        self._must_gather_weights = self.recipe.parallel.overlap_param_gather

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Complete the weights on every replica, if the last update left that to the next step; collective.

        With `parallel.overlap_param_gather` each replica has only its own share of the updated weights until its
        modules run: who reads weights otherwise, as a checkpoint does, calls this first.
        """
        if self._must_gather_weights:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
            self._must_gather_weights = False

    def _mean_targets(self, batch: Batch) -> float:
        """Return the mean number of target tokens per microbatch, over all microbatches of all replicas."""
        targets = torch.tensor(
            [batch.loss_mask.sum()], dtype=torch.float64, device=self.mesh.device
        )
        num_microbatches = self.recipe.num_microbatches * self.recipe.parallel.data
        return float(self.mesh.all_reduce_sum(targets)) / num_microbatches

    @torch.no_grad()
    def evaluate(self, batch: Batch, num_groups: int = 1) -> Losses:
        """Compute the losses of held-out rows; collective over all ranks.

        Args:
            batch: This replica's share of the rows.
            num_groups: Number of groups of targets, by the rows' `denoiser_ids`, whose losses are summed apart.
        """
        # Modules would gather them one after the other, with no backward pass to hide it behind.
        self.gather_weights()
        return self._run(batch, num_groups, forward_only=True)

    def _run(self, batch: Batch, num_denoisers: int, *, forward_only: bool) -> Losses:
        """Pass a batch through the pipeline, microbatch by microbatch, and sum its losses over replicas."""
        size = self.recipe.training.micro_batch_size
        assert len(batch) % size == 0
        microbatches = send_batch(
            batch,
            self.mesh.device,
            size,
            needs_host_intervals=needs_host_intervals(self.recipe.attention_backend),
        )
        # Set for each call, since validation and training have different numbers of microbatches.
        self.config.microbatch_group_size_per_vp_stage = self.recipe.parallel.microbatch_group_size(
            len(microbatches)
        )

        results = get_forward_backward_func()(
            forward_step_func=partial(self._forward, num_denoisers=num_denoisers),
            data_iterator=[iter(microbatches) for _ in self.model],  # every chunk reads all of them
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=batch.tokens.shape[1],
            micro_batch_size=size,
            forward_only=forward_only,
        )

        # Loss sums, target counts, positions and visible keys: one vector, so that one message reduces them all.
        # Only the last pipeline stage gets results from the schedule. The zeros of the others are ignored by the sum
        # below.
        values = torch.zeros(2 * num_denoisers + 2, dtype=torch.float64, device=self.mesh.device)
        for result in results:
            values[:-2] += result["losses"]
        values[-2] = batch.tokens.size
        values[-1] = num_visible_keys(self.recipe.model, batch.kv_start, batch.kv_end)

        total = self.mesh.all_reduce_sum(values).cpu().numpy()
        return Losses(
            sums=total[:num_denoisers],
            targets=total[num_denoisers:-2],
            positions=float(total[-2]),
            num_visible_keys=float(total[-1]),
        )

    def _forward(
        self, microbatches: Iterator[DeviceBatch], model: torch.nn.Module, *, num_denoisers: int
    ) -> tuple[Tensor, LossFunction]:
        """Run this stage on the next microbatch, in the form that Megatron-Core's schedules call.

        Returns:
            The stage's output, and the function that turns the last stage's output into the loss.
        """
        batch = next(microbatches)
        # int32 tensors are widened on the device, after a copy of half the bytes.
        output = model(
            batch.tokens.long(),
            batch.position_ids.long(),
            batch.intervals,
            labels=batch.labels.long(),
            output_index=batch.output_index,
        )
        z_loss = self.recipe.optimizer.z_loss
        return output, partial(_loss, batch=batch, num_denoisers=num_denoisers, z_loss=z_loss)


def _choose_kernels(recipe: Recipe, mesh: Mesh) -> KernelPlan:
    """Choose the kernels that every rank can have, and log them on rank 0; collective.

    Raises:
        RecipeError: On every rank, if the recipe demands a kernel that one of them cannot have.
    """
    plan = plan_kernels(recipe, mesh.all_gather(find_obstacles(recipe)))
    if mesh.is_rank0:
        logger.info("%s: kernels: %s", recipe.name, plan.describe())
    return plan


def _loss(
    output: Tensor, *, batch: DeviceBatch, num_denoisers: int, z_loss: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum a microbatch's losses over targets, in total and per denoiser.

    Args:
        output: (B, S) nats, or with z-loss (2, B, S): nats, and the softmax's log Z. (1, N) and (2, 1, N) if the
            microbatch has an `output_index`.
        batch: The microbatch.
        num_denoisers: Number of denoisers in the mixture.
        z_loss: Weight of log^2 Z in the total; the losses per denoiser exclude it.

    Returns:
        Loss sum, number of targets, and "losses": (2 * num_denoisers,) float64 of sums, then counts.
    """
    device = output.device
    token_losses, *log_z = output.unbind() if z_loss else (output,)
    # Padding and inputs have mask 0, so their losses count nowhere.
    targets = batch.select_outputs(batch.loss_mask).float()
    masked = token_losses.float() * targets

    # Padding has the id -1 and no targets: it adds zero to the first denoiser.
    denoiser_ids = torch.clamp(batch.select_outputs(batch.denoiser_ids).long(), min=0).ravel()
    sums = torch.zeros(2, num_denoisers, dtype=torch.float64, device=device)
    sums[0].index_add_(0, denoiser_ids, masked.detach().double().ravel())
    sums[1].index_add_(0, denoiser_ids, targets.double().ravel())

    total = masked.sum()
    for log_z_of_tokens in log_z:
        total = total + z_loss * (log_z_of_tokens.float().square() * targets).sum()
    # An integer, since the schedule adds it in place to an int tensor, which refuses a float.
    return total, targets.sum().int(), {"losses": sums.ravel()}
