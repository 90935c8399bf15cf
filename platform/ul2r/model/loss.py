"""The loss of each token, and the softmax's denominator for z-loss."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from ul2r.model.layers import ScaledGPTModel


class LogZGPTModel(ScaledGPTModel):
    """A model whose loss comes with log Z, the logarithm of the softmax's denominator."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses of a microbatch.

        The loss of a token is log Z less the logit of its label, so that log Z is their sum. No second pass over
        the vocabulary is made, and none of its size kept.

        Args:
            labels: (B, S) int64.
            logits: (S, B, V / tensor ranks) this rank's part of the vocabulary.

        Returns:
            (2, B, S) float32: the loss in nats, and log Z.
        """
        label_logits = gather_label_logits(
            labels, logits
        )  # before Megatron's loss, which shifts fp32 logits in place
        losses = super().compute_language_model_loss(labels, logits)
        return torch.stack((losses, losses + label_logits))


def gather_label_logits(labels: Tensor, logits: Tensor) -> Tensor:
    """Each label's logit, from the tensor rank that has it.

    Args:
        labels: (B, S) int64.
        logits: (S, B, V / tensor ranks) this rank's part of the vocabulary.

    Returns:
        (B, S) float32, the same on every tensor rank.
    """
    size = logits.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * size
    place = labels.transpose(0, 1) - first
    here = (place >= 0) & (place < size)
    flat = place.clamp(0, size - 1).flatten()
    flat = flat + size * torch.arange(len(flat), device=flat.device)
    # Unlike gather, index_select keeps no logits for the backward pass, so that they may be overwritten.
    own = logits.flatten().index_select(0, flat).view_as(place).float()
    # Megatron adds up in place, and what is not contiguous not at all.
    found: Tensor = reduce_from_tensor_model_parallel_region(own.where(here, 0.0).contiguous())
    return found.transpose(0, 1)
