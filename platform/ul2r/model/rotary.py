"""Rotary position embeddings (arXiv 2104.09864), which may differ between local and global layers."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from ul2r.config import Architecture
from ul2r.model.lazy_compile import compile_at_first_call


def compute_frequencies(architecture: Architecture, rotary: RotaryEmbedding) -> Tensor:
    """Compute the frequencies from which Megatron's module makes the architecture's angles.

    Args:
        architecture: The model, for its scaling and its local layers' `local_rope_theta`.
        rotary: Megatron's module, with frequencies of `rope_theta`.

    Returns:
        float32 (D / 2,) for heads of which D dimensions are rotated; (D,) with `local_rope_theta`, those of global
        layers first.
    """
    scaled = _scale_frequencies(architecture, rotary)
    if architecture.local_rope_theta is None:
        return scaled

    local = RotaryEmbedding(
        kv_channels=architecture.head_dim,
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.local_rope_theta,
        use_cpu_initialization=scaled.device.type == "cpu",
    )
    # Megatron computes the angles once for all layers, so both kinds travel in one tensor; see `select_angles`.
    return torch.cat((scaled, local.inv_freq))


def select_angles(angles: Tensor, *, local: bool) -> Tensor:
    """Return the angles of local or of global layers.

    Args:
        angles: float32 (S, 1, 1, 2 D). Megatron computes it from (D,) frequencies and repeats it once along the last
            axis, for the two halves of a head: global, local, global, local.
        local: True for a layer with a window.

    Returns:
        float32 (S, 1, 1, D).
    """
    halves = angles.view(*angles.shape[:-1], 2, 2, -1)  # (S, 1, 1, half, kind, D / 2)
    return halves[..., int(local), :].flatten(-2)


def _scale_frequencies(architecture: Architecture, rotary: RotaryEmbedding) -> Tensor:
    frequencies: Tensor = rotary.inv_freq
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor

    # Megatron's private Llama 3 formula. Its constructor applies it with a factor alone; Llama 3's other three numbers
    # are this method's defaults.
    scaled: Tensor = rotary._apply_scaling(
        frequencies,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    return scaled


def install_compiled_rotation() -> None:
    """Let Megatron-Core compute `apply_rope_fusion` by torch.compile, in place of TransformerEngine's kernel.

    Its models with that setting (0.16 to 0.19) call what this module-level name holds, None without TransformerEngine.
    """
    rope_utils.fused_apply_rotary_pos_emb = _compiled_rotation


def _rotate(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate heads (S, B, H, D) by angles (S, 1, 1, D'), D' <= D, by Megatron's plain function."""
    rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        heads, angles, rotary_interleaved=interleaved
    )
    return rotated


# One for all models, so that it is compiled once.
_compiled_rotation = compile_at_first_call(_rotate)
