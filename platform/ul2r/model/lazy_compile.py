"""torch.compile for Megatron-Core's fusions, put off until a fusion runs.

Megatron-Core decorates 50 functions with `torch.compile` on import, which loads Inductor and Dynamo: 3 of the 6 CPU
seconds that the import takes (Megatron-Core 0.16.1, torch 2.11), in every process, also where no fusion is used.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

MODULE = "megatron.core.jit"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def replace_jit_fuser() -> None:
    """Let Megatron-Core find this module's decorator as its own; call it before Megatron-Core is imported."""
    module = types.ModuleType(MODULE)
    module.jit_fuser = compile_at_first_call  # type: ignore[attr-defined]  # as Megatron-Core's module has it
    sys.modules.setdefault(MODULE, module)


def compile_at_first_call(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function that compiles `function` when it is first called."""
    compiled: Callable[Parameters, Result] | None = None

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # Not at the top: parts of this package that load no torch import it too.
        import torch

        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call
