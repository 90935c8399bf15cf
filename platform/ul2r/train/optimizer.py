"""Megatron-Core's AdamW, sharded over data-parallel ranks, and its learning rate by step."""

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


def build_optimizer(recipe: Recipe, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the distributed optimizer.

    Norms and biases have no weight decay, nor have embeddings unless the recipe says so.
    """
    settings = recipe.optimizer
    is_low_precision = recipe.precision != "fp32"
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        clip_grad=settings.max_grad_norm,
        use_distributed_optimizer=True,
        bf16=is_low_precision,
        params_dtype=torch.bfloat16 if is_low_precision else torch.float32,
    )

    # Megatron-Core's overrides exempt norms and biases.
    overrides = get_standard_config_overrides(config)
    if not settings.decay_embeddings:
        embeddings = ParamKey(
            with_name_predicate=ParamWithNamePredicate("embedding", _is_embedding)
        )
        overrides[embeddings] = ParamGroupOverride(wd_mult=0.0)

    optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    _allocate_state(unwrap_chained_optimizer(optimizer))
    return optimizer


def unwrap_chained_optimizer(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    """Return the only optimizer of the chain that `get_megatron_optimizer` builds.

    The chain would have a second one for experts under expert parallelism, which recipes do not offer.
    """
    (distributed,) = optimizer.chained_optimizers
    return distributed


def _is_embedding(parameter: torch.nn.Parameter, name: str) -> bool:
    # The last pipeline stage's copy of a tied embedding is called output_layer; Megatron-Core marks it.
    return "embedding" in name or getattr(parameter, "shared_embedding", False)


def load_optimizer_settings(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load the step counts of a checkpoint whose moments have been loaded, and none of its other settings.

    Megatron-Core would load learning rates and weight decay as well, or refuse if they differ from the recipe's.

    Args:
        optimizer: The distributed optimizer.
        loaded: State from `optimizer_state.shard_optimizer_state`, after loading.
    """
    # Groups differ in `wd_mult`; Megatron-Core gives them no name that is the same in both lists.
    own = {group["wd_mult"]: group for group in optimizer.param_groups}
    for group in loaded["optimizer"]["param_groups"]:
        settings = own[group["wd_mult"]]
        group.update({key: settings[key] for key in settings.keys() - {"params", "step"}})

    distributed = unwrap_chained_optimizer(optimizer)
    distributed.load_state_dict({"optimizer": loaded["optimizer"]})
    # Megatron-Core gives all parameters of torch's AdamW the same count tensor; each of them would advance it.
    for state in distributed.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _allocate_state(distributed: DistributedOptimizer) -> None:
    """Allocate zero moments, which torch would do at the first step: they are saved and loaded before it too."""
    distributed.init_state_fn(distributed.optimizer, distributed.config)
    # Megatron-Core's function leaves out the count, which its own `state_dict` reads from each parameter of torch's
    # AdamW. TransformerEngine's optimizer, which is used where it is installed, counts by group.
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for state in distributed.optimizer.state.values():
            # On the CPU and in fp32, as torch's AdamW itself creates it unless it is capturable or fused.
            state["step"] = torch.zeros((), dtype=torch.float32)


class LearningRateSchedule:
    """Learning rate as a function of the step alone."""

    def __init__(self, recipe: Recipe, optimizer: MegatronOptimizer) -> None:
        settings = recipe.optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.learning_rate,
            min_lr=settings.final_learning_rate,
            lr_warmup_steps=recipe.warmup_steps,
            lr_decay_steps=recipe.training.steps,
            # The recipe's names are Megatron-Core's, apart from the case of this one.
            lr_decay_style="WSD" if settings.schedule == "wsd" else settings.schedule,
            wsd_decay_steps=recipe.decay_steps,
            # 1 - sqrt: Haegele et al. 2024, arXiv 2405.18392, section 3.
            lr_wsd_decay_style="minus_sqrt",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            # Required arguments; equal start and end keep the weight decay constant.
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> None:
        """Set the rate for `step`, counted from 0; that of the first warm-up step is above zero."""
        # The scheduler counts steps itself. Set back to zero each time, it depends on nothing but `step`.
        self._scheduler.num_steps = 0
        self._scheduler.step(step + 1)
