"""Frequencies and angles of rotary positions (arXiv 2104.09864), where layers of one model may have two kinds."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from ul2r.config import Architecture


def compute_frequencies(architecture: Architecture, rotary: RotaryEmbedding) -> Tensor:
    """Frequencies that make Megatron's angles those of the architecture.

    Args:
        architecture: What stretches them, and whether layers with a window have others.
        rotary: Megatron's module, with frequencies of `rope_theta`.

    Returns:
        float32 (D / 2,) for heads of which D dimensions are rotated; with `local_rope_theta` (D,), those of layers that
        see all keys first.
    """
    stretched = _stretched(architecture, rotary)
    if architecture.local_rope_theta is None:
        return stretched
    local = RotaryEmbedding(
        kv_channels=architecture.head_dim,
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.local_rope_theta,
        use_cpu_initialization=stretched.device.type == "cpu",
    )
    return torch.cat((stretched, local.inv_freq))


def select_angles(both: Tensor, *, local: bool) -> Tensor:
    """One kind of layer's angles.

    Args:
        both: float32 (S, 1, 1, 2 D), what Megatron makes of (D,) `compute_frequencies`: all of them, and all once more.
        local: Whether the layer has a window.

    Returns:
        float32 (S, 1, 1, D).
    """
    halves = both.view(*both.shape[:-1], 2, 2, -1)
    return halves[..., int(local), :].flatten(-2)


def _stretched(architecture: Architecture, rotary: RotaryEmbedding) -> Tensor:
    found: Tensor = rotary.inv_freq
    scaling = architecture.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        found = found / scaling.factor
    elif scaling is not None:
        found = rotary._apply_scaling(
            found,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )
    return found
