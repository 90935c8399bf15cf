"""The attention backend: its choice, and the recipes that each backend cannot train."""

from __future__ import annotations

from typing import Literal

from ul2r.config.architecture import Architecture
from ul2r.config.launch import Launch
from ul2r.config.training import Precision

AttentionBackend = Literal["sdpa", "flex", "te"]
AttentionChoice = Literal["auto"] | AttentionBackend

FLEX_HEAD_DIM = 16
"""Narrowest attention head that FlexAttention's CUDA kernels support."""


def resolve_attention(
    attention: AttentionChoice, model: Architecture, launch: Launch
) -> AttentionBackend:
    """Return the backend that computes attention, with `auto` resolved."""
    if attention != "auto":
        return attention
    # FlexAttention skips blocks that no query of the block sees; the dense mask of SDPA does not.
    is_wide = model.head_dim >= FLEX_HEAD_DIM
    return "flex" if launch.gpus_per_worker and is_wide else "sdpa"


def check_attention(
    attention: AttentionChoice, model: Architecture, launch: Launch, precision: Precision
) -> None:
    """Refuse a backend that cannot train the model on the recipe's devices.

    Args:
        attention: The recipe's choice.
        model: The model.
        launch: Its devices.
        precision: What it is trained in, "auto" resolved.

    Raises:
        ValueError: With the reason.
    """
    # "auto" needs none of these checks: `resolve_attention` never chooses a backend that they refuse.
    if attention in {"flex", "te"} and not launch.gpus_per_worker:
        reason = (
            "FlexAttention has no backward pass there"
            if attention == "flex"
            else "its kernels need CUDA"
        )
        raise ValueError(
            f"attention={attention} does not train on a CPU ({reason}) and launch.gpus_per_worker=0: "
            "set attention to auto or sdpa, or launch.gpus_per_worker to 1"
        )
    if attention == "te" and precision == "fp32":
        raise ValueError(
            "attention=te has bf16 kernels only, and training.precision=fp32: set attention to auto, flex or sdpa, "
            "or training.precision to bf16"
        )
    # A window of all layers does not count here: rows are not longer than it (`Architecture.layer_windows`).
    if attention == "te" and any(model.layer_windows):
        raise ValueError(
            "attention=te does not support sliding windows, and "
            f"model.sliding_window_pattern={model.sliding_window_pattern}: set attention to auto, flex or sdpa"
        )
    if attention == "flex" and model.head_dim < FLEX_HEAD_DIM:
        raise ValueError(
            f"attention=flex needs heads of at least {FLEX_HEAD_DIM} dimensions, the model's have "
            f"hidden_size/num_heads={model.head_dim}: set attention to auto or sdpa, or lower model.num_heads"
        )
