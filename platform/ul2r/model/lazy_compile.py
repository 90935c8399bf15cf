"""torch.compile for Megatron-Core's fusions, put off until a fusion runs, and an optimizer without Dynamo.

Megatron-Core decorates 50 functions with `torch.compile` when it is imported, which loads Inductor and Dynamo: 3 of the
6 CPU seconds that the import takes (Megatron-Core 0.16.1, torch 2.13), in every process, also where no fusion is used.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

PACKAGE = "megatron.core"
DISABLED = "__dynamo_disable"
"""Attribute of a function that torch excludes from compilation: what it calls in its place."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def compile_lazily() -> None:
    """Replace `torch.compile` while modules of Megatron-Core are imported; call it before the first one is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds Megatron-Core's modules as Python does, and changes the environment in which their code runs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{fullname}.".startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]  # a loader of this module alone
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run a module's code with `compile_at_first_call` in place of `torch.compile`."""
    import torch

    # Modules import each other: the inner one's original is the outer one's replacement.
    original = torch.compile
    torch.compile = compile_at_first_call  # type: ignore[assignment]  # only the form that takes a function
    try:
        execute(module)
    finally:
        torch.compile = original


def compile_at_first_call(
    function: Callable[Parameters, Result],
    **options: Any,  # noqa: ANN401  torch's own options
) -> Callable[Parameters, Result]:
    """Return a function that compiles `function` when it is first called.

    Args:
        function: A function, not a module.
        options: Options of `torch.compile`.
    """
    compiled: Callable[Parameters, Result] | None = None

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # Not at the top: parts of this package that load no torch import it too.
        import torch

        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


def use_optimizers_without_dynamo() -> None:
    """Let torch's AdamW not import Dynamo, 2 CPU seconds in every process, to exclude itself from compilation.

    torch 2.13 wraps four methods of optimizers so that Dynamo never traces them (`torch._compile`), and Adam's step so
    that it breaks Dynamo's graph (`_use_grad_for_differentiable`). Both import Dynamo at the first call. Nothing that
    is compiled here calls an optimizer.
    """
    from torch.optim import Adam, Optimizer

    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        # Where torch keeps the result of the first call.
        if method is not None and not hasattr(method, DISABLED):
            setattr(method, DISABLED, method)
    if Adam.step.__name__ != _step_without_dynamo.__name__:
        _step_without_dynamo.__wrapped__ = inspect.unwrap(Adam.step)  # type: ignore[attr-defined]  # of any function
        Adam.step = _step_without_dynamo  # type: ignore[method-assign,assignment]  # as torch's own hooks do


def _step_without_dynamo(optimizer: Any, closure: Any = None) -> Any:  # noqa: ANN401  as torch's own
    """Take Adam's step as `_use_grad_for_differentiable` does, but for the breaks in Dynamo's graph."""
    import torch

    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        return _step_without_dynamo.__wrapped__(optimizer, closure)  # type: ignore[attr-defined]  # set above
