"""Megatron-Core's fusions are compiled when they run, not when they are imported; AdamW needs no compiler."""

from __future__ import annotations

import subprocess
import sys

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


TAKE_STEPS = """
import sys
import torch
from ul2r.model.lazy_compile import use_optimizers_without_dynamo
if sys.argv[1] == "without":
    use_optimizers_without_dynamo()
weight = torch.nn.Parameter(torch.linspace(-1, 1, 9))
optimizer = torch.optim.AdamW([weight], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (weight**2 - weight).sum().backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, weight.requires_grad, [number.hex() for number in weight.tolist()])
"""


def test_an_optimizer_that_imports_no_compiler_takes_the_same_steps() -> None:
    """In processes of their own: this one has imported Dynamo."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", TAKE_STEPS, form], capture_output=True, text=True, check=True
        ).stdout
        for form in ("without", "with")
    ]
    assert printed[0].startswith("False True")
    assert printed[1] == printed[0].replace("False", "True")
