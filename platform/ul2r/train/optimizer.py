"""AdamW of Megatron-Core, sharded over data-parallel ranks, and its learning rate by step."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ul2r.config import Recipe


def build_optimizer(recipe: Recipe, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """The distributed optimizer; norms are exempt from weight decay."""
    settings = recipe.optimizer
    on_cuda = torch.cuda.is_available()
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        clip_grad=settings.clip,
        use_distributed_optimizer=True,
        bf16=on_cuda,
        params_dtype=torch.bfloat16 if on_cuda else torch.float32,
    )
    optimizer = get_megatron_optimizer(config, model)
    for part in optimizer.chained_optimizers:
        if isinstance(
            part.optimizer, torch.optim.AdamW
        ):  # else Transformer Engine's, which needs no help
            _allocate_state(part.optimizer)
            _restore_steps(part)
    return optimizer


def _allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Give torch's AdamW its zero state now; Megatron expects it to be there when a checkpoint is loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _restore_steps(part: DistributedOptimizer) -> None:
    """Mend how Megatron-Core 0.16 loads torch's AdamW from a fully reshardable checkpoint.

    It gives one `step` tensor to all parameters, which AdamW would then advance once for each of them, and
    afterwards asks the checkpoint for a `step` that it did not save. Here each parameter keeps its own copy.
    """
    set_states = part._set_main_param_and_optimizer_states

    def set_states_and_step(model_parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = part.model_param_group_index_map[model_parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(model_parameter, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = set_states_and_step


class Schedule:
    """Learning rate as a function of the step alone."""

    def __init__(self, recipe: Recipe, optimizer: MegatronOptimizer) -> None:
        settings, steps = recipe.optimizer, recipe.training.steps
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.learning_rate,
            min_lr=settings.final_learning_rate,
            lr_warmup_steps=recipe.warmup_steps,
            lr_decay_steps=steps,
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> None:
        """Set the rate for `step`, counted from 0; the first warm-up step is above zero."""
        self._scheduler.num_steps = 0
        self._scheduler.step(step + 1)
