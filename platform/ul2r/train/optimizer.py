"""Megatron-Core's AdamW, sharded over data-parallel ranks, and its learning rate by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from ul2r.config import Recipe
from ul2r.model.kernels import Implementation, KernelPlan
from ul2r.model.lazy_compile import use_optimizers_without_dynamo


def build_optimizer(
    recipe: Recipe, model: list[DistributedDataParallel], kernels: KernelPlan
) -> MegatronOptimizer:
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
        overlap_param_gather=recipe.parallel.overlap_param_gather,
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

    _select_optimizer(kernels.optimizer)
    use_optimizers_without_dynamo()
    optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    distributed = unwrap_chained_optimizer(optimizer)
    if kernels.optimizer == "torch's fused AdamW":
        _fuse(distributed)
    _allocate_state(distributed)
    return optimizer


def _select_optimizer(implementation: Implementation | None) -> None:
    """Make Megatron-Core take an implementation of AdamW in this process.

    It knows no setting for that, and prefers TransformerEngine's and Apex's to torch's where they are installed.
    0.16 to 0.19 read these module-level names, all but the first again when they save and load.
    """
    is_engine = implementation == "TransformerEngine"
    is_apex = implementation == "Apex"
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = not (is_engine or is_apex)
    distrib_optimizer.HAVE_APEX_OR_TE = is_engine or is_apex
    distrib_optimizer.USING_TE_OPTIMIZER = is_engine
    distrib_optimizer.USING_APEX_OPTIMIZER = is_apex


def _fuse(distributed: DistributedOptimizer) -> None:
    """Make torch's AdamW update all parameters of a group in one kernel; Megatron-Core passes no option for it."""
    optimizer = distributed.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    # All that AdamW's constructor does with fused=True (torch 2.11 to 2.13), but for two marks of gradient scalers.
    optimizer.defaults["fused"] = True
    for group in optimizer.param_groups:
        group["fused"] = True


def unwrap_chained_optimizer(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    """Return the only optimizer of the chain that `get_megatron_optimizer` builds.

    The chain would have a second one for experts under expert parallelism, which recipes do not offer.
    """
    (distributed,) = optimizer.chained_optimizers
    return distributed


def iter_owned_ranges(
    distributed: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Yield each parameter that this rank updates elements of, with the range of those elements in it."""
    # gbuf_ranges: per gradient buffer a dict by dtype, of lists of buckets. "param" is the range within the
    # parameter; the other ranges of an entry count from the start of the buffer.
    for ranges_by_dtype in distributed.gbuf_ranges:
        for bucket in chain.from_iterable(ranges_by_dtype.values()):
            for parameter, ranges in bucket["param_map"].items():
                yield parameter, ranges["param"]


def scale_rows(
    distributed: DistributedOptimizer,
    chunks: Sequence[GPTModel],
    tokens: Iterable[int],
    factor: float,
) -> None:
    """Multiply the learning rate of some tokens' rows in embedding and output matrix by a factor.

    A row of a matrix cannot have a parameter group of its own, and AdamW's update does not depend on the scale of the
    gradient: so the updates of these elements are multiplied, weight decay included, which is the same. Each rank does
    it for the elements that it owns.

    Args:
        distributed: The optimizer; updates of its own hooks are changed from now on.
        chunks: Its model, of which embedding and output matrix are split by rows over tensor ranks.
        tokens: Ids of the rows.
        factor: Of the learning rate.
    """
    elements: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    matrices = {
        parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    }
    rows = torch.tensor(sorted(tokens))
    for parameter, owned in iter_owned_ranges(distributed):
        if parameter not in matrices:
            continue
        num_rows, width = parameter.shape
        own = rows - parallel_state.get_tensor_model_parallel_rank() * num_rows
        own = own[(own >= 0) & (own < num_rows)]
        index = (own[:, None] * width + torch.arange(width)).flatten() - owned.start
        index = index[(index >= 0) & (index < owned.end - owned.start)]
        elements.append((parameter, index.to(parameter.device)))

    def read_main(parameter: torch.nn.Parameter) -> torch.Tensor:
        # Flat, in fp32, of the owned range; private to Megatron-Core's DistributedOptimizer (0.16).
        main: torch.Tensor = distributed._get_main_param_and_optimizer_states(parameter)["param"]
        return main.detach()

    before: list[torch.Tensor] = []

    def remember(*_: Any) -> None:  # noqa: ANN401  torch's hooks
        before[:] = [read_main(parameter)[index] for parameter, index in elements]

    def scale(*_: Any) -> None:  # noqa: ANN401  torch's hooks
        for (parameter, index), old in zip(elements, before, strict=True):
            main = read_main(parameter)
            main[index] = old + factor * (main[index] - old)

    distributed.optimizer.register_step_pre_hook(remember)
    distributed.optimizer.register_step_post_hook(scale)


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
    saved = loaded["optimizer"]["param_groups"]
    groups = [_replace_settings(group, own[group["wd_mult"]]) for group in saved]

    distributed = unwrap_chained_optimizer(optimizer)
    distributed.load_state_dict({"optimizer": {"param_groups": groups}})
    # Megatron-Core gives all parameters of torch's AdamW the same count tensor; each of them would advance it.
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for state in distributed.optimizer.state.values():
            state["step"] = _make_count(distributed.optimizer, state, float(state["step"]))


def _replace_settings(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a group's own settings with the step count of a saved group.

    The count is an int in TransformerEngine's optimizer, which before its first step has none, and a float in torch's.
    """
    return {key: own[key] for key in own.keys() - {"params"}} | {"step": int(saved.get("step", 0))}


def _allocate_state(distributed: DistributedOptimizer) -> None:
    """Allocate zero moments, which torch would do at the first step: they are saved and loaded before it too."""
    distributed.init_state_fn(distributed.optimizer, distributed.config)
    # Megatron-Core's function leaves out the count, which its own `state_dict` reads from each parameter of torch's
    # AdamW. TransformerEngine's optimizer, which is used where it is installed, counts by group.
    if isinstance(distributed.optimizer, torch.optim.AdamW):
        for state in distributed.optimizer.state.values():
            state["step"] = _make_count(distributed.optimizer, state, 0.0)


def _make_count(optimizer: torch.optim.AdamW, state: dict[str, Any], steps: float) -> torch.Tensor:
    """Return a parameter's step count as torch's AdamW itself creates it: on the CPU, or if fused with its moments."""
    device = state["exp_avg"].device if optimizer.defaults["fused"] else torch.device("cpu")
    return torch.tensor(steps, dtype=torch.float32, device=device)


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
