"""Mixture-of-experts layers (Mixtral): Megatron-Core's, with a router and a balancing loss of our own."""

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
    """Router that sends each token to its most probable experts and weights their outputs by a softmax over them.

    Attributes:
        num_targets: Mean number of target tokens of a microbatch, over all microbatches of a step. Megatron-Core
            divides gradients by the step's targets, and so, with this factor, the balancing loss by its microbatches.
    """

    num_targets = 1.0

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002  Megatron's name
        """Compute the experts' logits in fp32.

        Megatron's own method computes them in the input's dtype, by TransformerEngine's GEMM if that is installed.

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
        """Return `activation`; its backward pass adds the gradient of a microbatch's balancing loss."""
        # Megatron's own method multiplies by the microbatch's positions, to undo a division by positions. Gradients are
        # divided by target tokens here, of which each denoiser has a different share.
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * self.num_targets)
        return attached


def make_expert_settings(architecture: Architecture, aux_loss_coeff: float) -> dict[str, Any]:
    """Return Megatron's settings for a model with experts, each of them sharded over all tensor ranks.

    Args:
        architecture: The model.
        aux_loss_coeff: Weight of the balancing loss.
    """
    # Megatron's defaults complete Mixtral's router: the softmax follows the choice (`moe_router_pre_softmax` is false).
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.num_experts_per_token,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": aux_loss_coeff,
        "moe_token_dispatcher_type": "allgather",
    }


def set_router(spec: ModuleSpec) -> None:
    """Replace the router in the spec of a layer with experts, in place."""
    mlp = spec.submodules.mlp
    # A ModuleSpec in Megatron-Core 0.16, a partial in later versions.
    experts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    experts.router = Router

    # The local spec renames this norm in checkpoints to the one that TransformerEngine fuses into a dense MLP. A layer
    # of experts has no fused norm: without the renaming, checkpoints of both kinds of layers have the same keys.
    spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)


def set_num_targets(chunks: Iterable[GPTModel], num_targets: float) -> None:
    """Set `Router.num_targets` of every router for a step."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                module.num_targets = num_targets
