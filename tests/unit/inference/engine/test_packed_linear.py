"""Packed layers compute what the original ones do."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ul2r.inference.engine.packed_linear import PackedLinear, pack_linear_layers


def test_packed_layers_compute_the_same_and_the_others_stay() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(24, 40), nn.ModuleDict({"inner": nn.Linear(40, 16, bias=False)}), Conv1D(9, 16)
    )
    norm = nn.LayerNorm(24)
    inputs = torch.randn(3, 5, 24)

    def run() -> torch.Tensor:
        hidden = network[0](norm(inputs))
        outputs: torch.Tensor = network[2](network[1]["inner"](hidden))  # type: ignore[index]  # a `ModuleDict`
        return outputs

    with torch.inference_mode():
        expected = run()
        pack_linear_layers(network)
        found = run()

    assert isinstance(network[0], PackedLinear)
    assert isinstance(network[2], PackedLinear)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
