"""CUDA redirected to the CPU, as other parts of torch see it."""

from __future__ import annotations

import torch

from ul2r.model.cpu import use_cpu


def test_redirected_functions_are_not_those_of_the_cpu() -> None:
    """torch 2.11's compiler has rules by object: it refuses to load if two names with different ones share it."""
    use_cpu()
    assert id(torch.cuda.manual_seed) != id(torch.manual_seed)
    torch.cuda.manual_seed(3)
    assert torch.initial_seed() == 3
