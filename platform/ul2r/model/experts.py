"""Experts (Mixtral): Megatron-Core's, with a router that works on a CPU and a balancing loss that knows no layout."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional

from ul2r.config import Architecture


class Router(TopKRouter):  # type: ignore[misc]  # Megatron has no types
    """Sends each token to the experts of the highest probability, whose outputs it weighs by a softmax over them.

    Attributes:
        targets: Target tokens of a microbatch, on average over all of a step. Megatron-Core divides gradients by
            their sum, and thereby the balancing loss by the number of microbatches.
    """

    targets = 1.0

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002  Megatron's name
        """Logits of the experts in fp32.

        Args:
            input: (S, B, H), S this rank's part of the row.

        Returns:
            (S, B, E) float32.
        """
        return functional.linear(input.float(), self.weight.float())

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,  # noqa: ARG002  in aux_loss already
        aux_loss: Tensor,
        *_: Any,  # noqa: ANN401  Megatron's
        **__: Any,  # noqa: ANN401  as above
    ) -> Tensor:
        """Give `activation` back, with the gradient of a microbatch's balancing loss in its backward pass."""
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * self.targets)
        return attached


def make_expert_settings(architecture: Architecture, balance: float) -> dict[str, Any]:
    """Megatron's settings for a model with experts, all of which each tensor rank has a part of.

    Args:
        architecture: Of the model.
        balance: Weight of the balancing loss.
    """
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.num_experts_per_token,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": balance,
        "moe_token_dispatcher_type": "allgather",
    }


def set_router(spec: ModuleSpec) -> None:
    """Give a layer of experts its `Router`, and its norm the name that both kinds of layers know it by."""
    parts, mlp = spec.submodules, spec.submodules.mlp
    # A ModuleSpec in Megatron-Core 0.16, where later ones have a function.
    experts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    experts.router = Router
    parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)


def set_num_targets(chunks: Iterable[GPTModel], targets: float) -> None:
    """Tell every router the step's `Router.targets`."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                module.targets = targets
