"""Loss of each token and log Z, the logarithm of the softmax's denominator, for z-loss."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from ul2r.model.layers import ScaledGPTModel


class LogZGPTModel(ScaledGPTModel):
    """Model whose loss comes with log Z."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the losses of a microbatch.

        A token's loss is log Z minus the logit of its label, so that log Z is the sum of the two. This needs no second
        pass over the vocabulary and keeps no tensor of its size.

        Args:
            labels: (B, S) int64.
            logits: (S, B, V / tensor ranks), this rank's part of the vocabulary.

        Returns:
            (2, B, S) float32: the loss in nats, and log Z.
        """
        # Before Megatron's loss, which shifts fp32 logits in place.
        label_logits = gather_label_logits(labels, logits)
        losses = super().compute_language_model_loss(labels, logits)
        return torch.stack((losses, losses + label_logits))


def gather_label_logits(labels: Tensor, logits: Tensor) -> Tensor:
    """Return each label's logit, summed over tensor ranks, of which one has it and the others add 0.

    Args:
        labels: (B, S) int64.
        logits: (S, B, V / tensor ranks), this rank's part of the vocabulary.

    Returns:
        (B, S) float32, the same on every tensor rank.
    """
    size = logits.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * size
    column = labels.transpose(0, 1) - first  # (S, B)
    is_own = (column >= 0) & (column < size)
    index = column.clamp(0, size - 1).flatten()
    # Positions in the flattened logits, (S * B * V / tensor ranks).
    index = index + size * torch.arange(len(index), device=index.device)

    # Unlike gather, index_select saves no logits for the backward pass, so they may be overwritten.
    own = logits.flatten().index_select(0, index).view_as(column).float()
    # Megatron's all-reduce works in place and leaves a tensor that is not contiguous unreduced.
    label_logits: Tensor = reduce_from_tensor_model_parallel_region(
        own.where(is_own, 0.0).contiguous()
    )
    return label_logits.transpose(0, 1)
