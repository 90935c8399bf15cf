"""A CPU as Megatron-Core's device.

Megatron-Core names CUDA in a few places: the current device, its random generators, `.cuda()`, the
`device` of new tensors, and a tensor's type name. `use_cpu()` answers those with the CPU, once in a
process, and nothing else in the code base needs to know. Run under gloo, Megatron is otherwise unmodified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` and the type name of CPU tensors, which Megatron compares with CUDA's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever torch returns
        del types
        named = dict(kwargs or {})
        if _is_cuda(named.get("device")):
            named["device"] = CPU
        if func is torch.Tensor.type and len(args) == 1 and not named:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **named)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def use_cpu() -> None:
    """Make this process's Megatron-Core run on the CPU; call it before anything of Megatron runs.

    Raises:
        RuntimeError: If CUDA is available, where it would hide the real device.
    """
    if torch.cuda.is_available():
        raise RuntimeError("use_cpu() was called where CUDA is available")
    if getattr(torch.cuda, "_ul2r_cpu", False):
        return
    from megatron.core.tensor_parallel import random as megatron_random

    generator = torch.default_generator

    def get_state(*_: object, **__: object) -> torch.Tensor:
        return generator.get_state()

    def set_state(state: torch.Tensor, *_: object, **__: object) -> None:
        generator.set_state(state)

    def identity(tensor: Any, *_: object, **__: object) -> Any:  # noqa: ANN401  tensor or module
        return tensor

    def nothing(*_: object, **__: object) -> None: ...

    redirected = {
        "current_device": lambda: CPU,
        "current_stream": _NoStream,
        "synchronize": nothing,
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "_ul2r_cpu": True,
    }
    for name, replacement in redirected.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, redirected[name])
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    for owner in (torch.Tensor, torch.nn.Module):
        setattr(owner, "cuda", identity)  # noqa: B010  mypy knows its type
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]  # torch has no type for it


class _NoStream:
    """A stream that is always done."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __exit__(self, *_: object) -> None: ...
