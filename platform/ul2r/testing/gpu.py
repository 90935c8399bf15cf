"""The device of GPU tests: the first CUDA device, or the CPU where they are rehearsed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.testing.recipes import tiny_recipe

DEVICE_VARIABLE = "UL2R_GPU_TESTS_DEVICE"
"""Environment variable: `cpu` runs GPU tests on a CPU, over gloo, except those that need CUDA itself."""


def is_rehearsal() -> bool:
    """Return whether GPU tests run on a CPU."""
    return os.environ.get(DEVICE_VARIABLE) == "cpu"


def get_device() -> torch.device:
    """Return the device that GPU tests run on."""
    return torch.device("cpu") if is_rehearsal() else torch.device("cuda", 0)


@contextmanager
def process_group(rendezvous: Path) -> Iterator[None]:
    """Form a process group of this process alone while the block runs: NCCL, or gloo in a rehearsal.

    Args:
        rendezvous: A file that does not exist yet.
    """
    # NCCL connects at once instead of in the first collective, so a test that fails to connect fails here.
    options: dict[str, Any] = {} if is_rehearsal() else {"device_id": get_device()}
    dist.init_process_group(
        "gloo" if is_rehearsal() else "nccl",
        init_method=f"file://{rendezvous}",
        rank=0,
        world_size=1,
        **options,
    )
    try:
        yield
    finally:
        # Not at the top: `ul2r.model` prepares the first import of Megatron-Core.
        from megatron.core import parallel_state

        # A run that fails leaves its groups, which would fail every later test of this process.
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def gpu_recipe(storage: Path, **changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """Return `tiny_recipe` for a GPU: by default in bf16, with attention that needs no compilation."""
    return tiny_recipe(
        storage, **{"attention": "sdpa", "launch": {"gpus_per_worker": 1}, **changes}
    )
