"""CPU as a device for Megatron-Core.

Megatron-Core hard-codes CUDA in a few places: the current device, its random generators, `.cuda()`, the `device` of
new tensors, and a tensor's type name. `use_cpu()` redirects them to the CPU, once per process, and no other module
needs to know. Otherwise Megatron-Core runs unmodified over gloo (seen with 0.16.1 and 0.19.2).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _RedirectCudaToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` in torch calls and the type names of CPU tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever torch returns
        del types
        named = dict(kwargs or {})

        # Gradient buffers, optimizer and schedules create tensors with device="cuda".
        if _is_cuda(named.get("device")):
            named["device"] = CPU

        # Gradient clipping and the distributed optimizer accept a tensor only if tensor.type() is
        # "torch.cuda.FloatTensor" or another CUDA type.
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
        RuntimeError: If CUDA is available, since the real device would be hidden.
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

    def return_unchanged(tensor: Any, *_: object, **__: object) -> Any:  # noqa: ANN401  tensor or module
        return tensor

    def do_nothing(*_: object, **__: object) -> None: ...

    redirected = {
        # Megatron passes the current device to torch.empty and the like, which take a torch.device as well as an int.
        "current_device": lambda: CPU,
        # Megatron waits for the device after pipeline communication and orders overlapped copies by streams.
        "current_stream": _NoStream,
        "synchronize": do_nothing,
        # model_parallel_cuda_manual_seed keeps a generator state per tensor rank with these three, for dropout.
        # Not torch.manual_seed itself: for this name torch 2.11's compiler has other rules, which go by object.
        "manual_seed": functools.partial(torch.manual_seed),
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        # Marks the process, so that a second call changes nothing.
        "_ul2r_cpu": True,
    }
    for name, replacement in redirected.items():
        setattr(torch.cuda, name, replacement)

    # torch.cuda re-exports these from torch.cuda.random, where callers may have them from.
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, redirected[name])

    # Megatron's own versions read torch.cuda.default_generators, which is empty without CUDA.
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state

    # Tied embeddings, expert weights and loaded checkpoints are moved by .cuda(), not by a device argument.
    for owner in (torch.Tensor, torch.nn.Module):
        setattr(owner, "cuda", return_unchanged)  # noqa: B010  mypy knows its type

    # Never exited: the redirection holds until the process ends.
    _RedirectCudaToCpu().__enter__()  # type: ignore[no-untyped-call]  # torch has no type for it


class _NoStream:
    """Stream whose work is always complete."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __exit__(self, *_: object) -> None: ...
