"""Speed of interval attention, forward and backward, compared with a dense mask and with plain causal attention.

    python benchmarks/attention.py

Rows of the `ul2r` mixture; bf16 and Llama's heads on a GPU, small and float32 on a CPU. Every backend that trains on
the device is measured: sdpa (dense mask), flex and, if installed, te; on a CPU, torch attends to te's segments one by
one. The backends take turns; each time is the median of its turns. Prints one JSON line with these figures of each
backend by row length:

    seconds            forward and backward pass of one layer
    prepare_seconds    preparation of the intervals, once for all layers
    dense_ratio        the dense mask's seconds divided by the backend's
    causal_share       fraction of plain causal attention's rate of visible (query, key) pairs; goal on a GPU: 0.8
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ul2r.config import Objective
from ul2r.model.attention import Backend, DenseMask, pack_intervals
from ul2r.model.attention.variable_length import TransformerEngineKernel, VariableLength
from ul2r.objective import Batch, Vocabulary, build_batch
from ul2r.testing.attention import attend_by_segment
from ul2r.testing.corpus import SyntheticWindows

NUM_TURNS = 7


@dataclass(frozen=True)
class Setting:
    """Sizes measured on a kind of device.

    Attributes:
        lengths: Row lengths.
        num_tokens: Positions of a microbatch, whatever the row length.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        dtype: Dtype of queries, keys and values.
    """

    lengths: tuple[int, ...]
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


SETTINGS = {
    "cuda": Setting((2048, 8192, 16384), 32768, 32, 8, 128, torch.bfloat16),
    "cpu": Setting((256, 512, 1024), 1024, 4, 2, 32, torch.float32),
}


def make_backends(device: torch.device) -> dict[str, Backend[Any]]:
    """Make the backends that can train on the device."""
    if device.type == "cpu":
        return {"sdpa": DenseMask(), "segments": VariableLength(attend_by_segment)}
    from ul2r.model.attention.flex import Flex

    backends: dict[str, Backend[Any]] = {"sdpa": DenseMask(), "flex": Flex()}
    if find_spec("transformer_engine"):
        backends["te"] = VariableLength(TransformerEngineKernel())
    return backends


def make_batch(length: int, num_rows: int) -> Batch:
    """Build rows of which only the intervals matter."""
    objective = Objective(sequence_length=length)
    sentinels = tuple(range(4, 4 + objective.num_sentinels_needed))
    modes = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    return build_batch(
        range(num_rows),
        objective=objective,
        vocabulary=Vocabulary(4 + len(sentinels), 0, modes, sentinels),
        seed=1,
        text_windows=SyntheticWindows(lambda _, size: np.zeros(size)),
    )


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute plain causal attention with torch's fastest kernel for it."""
    context = functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        is_causal=True,
        enable_gqa=True,
    )
    return context.permute(2, 0, 1, 3)


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has finished one turn."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(setting: Setting, length: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Measure each backend at one row length."""
    num_rows = setting.num_tokens // length
    batch = make_batch(length, num_rows)
    bounds = pack_intervals(batch.kv_start, batch.kv_end)
    scale = setting.head_dim**-0.5
    *leaves, upstream = (
        torch.randn(length, num_rows, heads, setting.head_dim, device=device, dtype=setting.dtype)
        for heads in (
            setting.num_heads,
            setting.num_kv_heads,
            setting.num_kv_heads,
            setting.num_heads,
        )
    )
    for leaf in leaves:
        leaf.requires_grad_()

    def differentiate(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)

    def attend_with(backend: Backend[Any]) -> Callable[..., Tensor]:
        return lambda query, key, value: backend(query, key, value, bounds, scale)

    def prepare_with(backend: Backend[Any]) -> Callable[[], object]:
        return lambda: backend.prepare(bounds[:, 0], bounds[:, 1], device)

    backends = make_backends(device)
    passes = {name: differentiate(attend_with(backend)) for name, backend in backends.items()}
    passes["causal"] = differentiate(attend_causally)
    seconds = time_in_turns(passes, device)
    prepare_seconds = time_in_turns(
        {name: prepare_with(backend) for name, backend in backends.items()}, device
    )

    num_pairs = int((batch.kv_end - batch.kv_start).sum())
    causal_rate = num_rows * length * (length + 1) // 2 / seconds["causal"]
    return {
        name: {
            "seconds": seconds[name],
            "prepare_seconds": prepare_seconds[name],
            "dense_ratio": seconds["sdpa"] / seconds[name],
            "causal_share": num_pairs / seconds[name] / causal_rate,
        }
        for name in backends
    }


def time_in_turns(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median seconds of each work; they take turns, after a first one that does not count."""
    for work in works.values():
        work()
    turns = [
        {name: time_once(work, device) for name, work in works.items()} for _ in range(NUM_TURNS)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in works}


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # figures on a CPU are those of one core
    setting = SETTINGS[device.type]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    figures = {
        str(length): {
            backend: {key: float(f"{value:.3g}") for key, value in values.items()}
            for backend, values in measure(setting, length, device).items()
        }
        for length in setting.lengths
    }
    print(json.dumps({"benchmark": "attention", "device": name, **figures}))


if __name__ == "__main__":
    main()
