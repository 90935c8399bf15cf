"""Norms for Megatron-Core's local layers."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """torch's norm as `config.normalization` names it, fit for sequence parallelism, which Megatron's wrapper is not.

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
        return _marked(kinds[config.normalization](hidden_size, eps=eps), config)


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
