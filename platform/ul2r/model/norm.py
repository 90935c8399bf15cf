"""Norms for Megatron-Core's local layers."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class Norm:
    """The norm that Megatron's configuration names, fit for sequence parallelism, which Megatron's wrapper is not.

    A tensor rank then normalises its own part of each row, so that its gradients of the parameters are parts of a
    sum. They are marked `sequence_parallel`, and Megatron-Core's `finalize_model_grads` adds them up.
    """

    def __new__(  # type: ignore[misc]  # a class, as specs need, that makes another's object
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """A norm over the last axis, of `hidden_size`."""
        kinds: dict[str, type[torch.nn.Module]] = {
            "RMSNorm": torch.nn.RMSNorm,
            "LayerNorm": torch.nn.LayerNorm,
        }
        centered = config.layernorm_zero_centered_gamma
        kind = ZeroCenteredNorm if centered else kinds[config.normalization]
        return _marked(kind(hidden_size, eps=eps), config)


class ZeroCenteredNorm(torch.nn.Module):
    """RMSNorm that multiplies by 1 + weight, all in fp32 (Gemma, whose checkpoints hold weights around 0)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        gain = 1 + self.weight.float()
        return functional.rms_norm(hidden.float(), gain.shape, gain, self.eps).type_as(hidden)


class ScaleOnlyNorm:
    """LayerNorm without a bias (PaLM, arXiv 2204.02311, section 2; Cohere), in the place of a `Norm`."""

    def __new__(  # type: ignore[misc]  # as above
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """A norm over the last axis, of `hidden_size`."""
        return _marked(torch.nn.LayerNorm(hidden_size, eps=eps, bias=False), config)


def _marked(norm: torch.nn.Module, config: TransformerConfig) -> torch.nn.Module:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
