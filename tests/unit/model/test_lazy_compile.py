"""Megatron-Core's fusions are compiled when they run, not when they are imported."""

from __future__ import annotations

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch._dynamo.utils import counters

from ul2r.model.lazy_compile import compile_at_first_call


def test_fusion_of_megatron_is_compiled_by_its_first_call() -> None:
    """The graphs are counted by torch's own compiler."""
    counters.clear()
    values = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    fused = fused_bias_swiglu.swiglu(values)

    gate, linear = values.chunk(2, dim=-1)
    torch.testing.assert_close(fused, gate * torch.sigmoid(gate) * linear)
    assert counters["stats"]["unique_graphs"] == 1

    fused_bias_swiglu.swiglu(values)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_function_keeps_its_name_and_takes_keywords() -> None:
    def scale(values: torch.Tensor, *, by: float) -> torch.Tensor:
        return values * by

    lazy = compile_at_first_call(scale)

    assert lazy.__name__ == "scale"
    assert lazy(torch.ones(2), by=3.0).tolist() == [3.0, 3.0]
