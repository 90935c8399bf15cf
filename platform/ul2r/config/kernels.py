"""Fused kernels of a training step: which of them a recipe demands, and which it cannot have."""

from __future__ import annotations

from typing import Literal

from ul2r.config.architecture import Architecture
from ul2r.config.strict_model import StrictModel
from ul2r.config.training import Precision

KernelChoice = Literal["auto", "fused", "plain"]


class Kernels(StrictModel):
    """Parts of a training step that are computed by one fused kernel, or by several plain ones.

    "fused" demands the fused kernel and is refused where it cannot be had. "auto" takes it on GPUs if what it needs is
    installed, and is "plain" on CPUs. Both compute the same but for rounding, so that a run may change between them.
    """

    swiglu: KernelChoice = "auto"
    """SwiGLU's activation and product: Megatron-Core's `bias_activation_fusion`, by torch.compile."""
    rope: KernelChoice = "auto"
    """Rotary position embeddings: TransformerEngine's kernel, or without it Megatron-Core's function by
    torch.compile."""
    optimizer: KernelChoice = "auto"
    """AdamW: TransformerEngine's or Apex's FusedAdam, or without them torch's AdamW with fused=True."""
    loss: KernelChoice = "auto"
    """Cross entropy: Megatron-Core's `cross_entropy_loss_fusion`, by torch.compile. Its gradients are bf16, so that
    training in fp32 has the plain one."""


def find_unsuitable_kernels(model: Architecture, precision: Precision) -> dict[str, str]:
    """Return why parts of a training step have no fused kernel on any device, by name.

    Args:
        model: The model.
        precision: What it is trained in, "auto" resolved.
    """
    reasons = {}
    if model.activation != "swiglu":
        reasons["swiglu"] = f"model.activation={model.activation}"
    if model.position_embedding != "rope":
        reasons["rope"] = f"model.position_embedding={model.position_embedding}"
    if precision == "fp32":
        reasons["loss"] = "training.precision is fp32, its gradients are bf16"
    return reasons


def check_kernels(kernels: Kernels, model: Architecture, precision: Precision) -> None:
    """Refuse a fused kernel that a recipe demands and that does not suit its model or precision.

    Raises:
        ValueError: With the reason.
    """
    for name, reason in find_unsuitable_kernels(model, precision).items():
        if getattr(kernels, name) == "fused":
            raise ValueError(
                f"kernels.{name}=fused is not for this run ({reason}): set kernels.{name} to auto or plain"
            )
