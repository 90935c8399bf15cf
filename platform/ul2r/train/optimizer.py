"""AdamW of Megatron-Core, sharded over data-parallel ranks, and its learning rate by step."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from ul2r.config import Recipe
from ul2r.train.checkpoint.optimizer_state import unwrap_chained_optimizer


def build_optimizer(recipe: Recipe, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """The distributed optimizer; norms, biases and, unless the recipe says so, embeddings have no weight decay."""
    settings = recipe.optimizer
    low = recipe.precision != "fp32"
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        clip_grad=settings.max_grad_norm,
        use_distributed_optimizer=True,
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
    )
    overrides = get_standard_config_overrides(config)
    if not settings.decay_embeddings:
        embeddings = ParamKey(
            with_name_predicate=ParamWithNamePredicate("embedding", _is_embedding)
        )
        overrides[embeddings] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    _allocate_state(unwrap_chained_optimizer(optimizer))
    return optimizer


def _is_embedding(parameter: torch.nn.Parameter, name: str) -> bool:
    """Whether it is the embedding, or the copy of a tied one on the last pipeline stage."""
    return "embedding" in name or getattr(parameter, "shared_embedding", False)


def load_optimizer_settings(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take step counts from a checkpoint whose moments were loaded, and none of its other settings.

    Megatron-Core would take rates and decay from there as well, or refuse where they differ.

    Args:
        optimizer: The distributed one.
        loaded: Of `optimizer_state.shard_optimizer_state`.
    """
    own = {group["wd_mult"]: group for group in optimizer.param_groups}
    for group in loaded["optimizer"]["param_groups"]:
        settings = own[group["wd_mult"]]
        group.update({key: settings[key] for key in settings.keys() - {"params", "step"}})
    part = unwrap_chained_optimizer(optimizer)
    part.load_state_dict({"optimizer": loaded["optimizer"]})
    for state in part.optimizer.state.values():
        # Torch's AdamW was given one count for all, and would advance it for each.
        if "step" in state:
            state["step"] = state["step"].clone()


def _allocate_state(part: DistributedOptimizer) -> None:
    """Give it zero moments now, which are saved and loaded into before the first step too."""
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.AdamW):  # TransformerEngine's counts by group
        for state in part.optimizer.state.values():
            state["step"] = torch.zeros((), dtype=torch.float32)


class LearningRateSchedule:
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
            lr_decay_style="WSD" if settings.schedule == "wsd" else settings.schedule,
            wsd_decay_steps=recipe.decay_steps,
            lr_wsd_decay_style="minus_sqrt",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> None:
        """Set the rate for `step`, counted from 0; the first warm-up step is above zero."""
        self._scheduler.num_steps = 0
        self._scheduler.step(step + 1)
