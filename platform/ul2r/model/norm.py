"""Norms for Megatron-Core's local layers.

With sequence parallelism each tensor rank normalizes its own part of each row, so that its gradients of the norm's
parameters are terms of a sum. Parameters marked `sequence_parallel` are the ones whose gradients Megatron-Core's
`finalize_model_grads` adds up over tensor ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class Norm:
    """Norm named by Megatron's configuration.

    Megatron's own wrapper, WrappedTorchNorm, refuses sequence parallelism and zero-centered norms.
    """

    def __new__(  # type: ignore[misc]  # specs need a class, this one creates torch's
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """Create a norm over the last axis, of length `hidden_size`."""
        kinds: dict[str, type[torch.nn.Module]] = {
            "RMSNorm": torch.nn.RMSNorm,
            "LayerNorm": torch.nn.LayerNorm,
        }
        is_zero_centered = config.layernorm_zero_centered_gamma
        kind = ZeroCenteredNorm if is_zero_centered else kinds[config.normalization]
        return _mark_sequence_parallel(kind(hidden_size, eps=eps), config)


class ZeroCenteredNorm(torch.nn.Module):
    """RMSNorm that multiplies by 1 + weight, all in fp32 (Gemma, whose checkpoints hold weights around 0)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last axis."""
        gain = 1 + self.weight.float()
        return functional.rms_norm(hidden.float(), gain.shape, gain, self.eps).type_as(hidden)


class ScaleOnlyNorm:
    """LayerNorm without bias (PaLM, arXiv 2204.02311, section 2; Cohere), in place of `Norm`."""

    def __new__(  # type: ignore[misc]  # as above
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """Create a norm over the last axis, of length `hidden_size`."""
        norm = torch.nn.LayerNorm(hidden_size, eps=eps, bias=False)
        return _mark_sequence_parallel(norm, config)


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> torch.nn.Module:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark
    return norm
