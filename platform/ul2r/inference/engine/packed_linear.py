"""Linear layers for a CPU, with weights in the layout of its matrix kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PACKED_ROWS = 16
"""Rows of the inputs that the layout is chosen for."""


def can_pack() -> bool:
    """Return True if torch has oneDNN's linear layer."""
    return bool(torch._C._has_mkldnn)


def pack_linear_layers(network: nn.Module) -> None:
    """Replace the float32 linear layers of a network on a CPU by `PackedLinear`, in place.

    A product of few rows reads the whole weight matrix. torch's own product brings it into the layout of the kernel
    in each call; this does it once. Weights that no other module shares are freed.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.dtype == torch.float32:
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif isinstance(child, Conv1D) and child.weight.dtype == torch.float32:
                # GPT-2's: (inputs, outputs).
                setattr(module, name, PackedLinear(child.weight.T.contiguous(), child.bias))


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed for oneDNN.

    The operators are those that torch's compiler puts in for a frozen model (torch 2.13, `_inductor/mkldnn_ir.py`).

    Args:
        weight: float32 (outputs, inputs), on the CPU.
        bias: float32 (outputs,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        # Not a buffer: an opaque layout can be neither moved nor saved.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., outputs) of (..., inputs)."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self.bias, "none", [], ""
        )
        return outputs
