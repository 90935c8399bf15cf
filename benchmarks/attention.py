"""How fast interval attention is, beside a dense mask and beside plain causal flash attention, forward and backward.

    python benchmarks/attention.py

Rows of the `ul2r` mixture; bf16 and heads as Llama has them on a GPU, small and in float32 on a CPU. Every backend that
trains on the device takes part: sdpa (dense mask), flex and, where it is installed, te; on a CPU the segments that te
is given are attended to one by one by torch. All take turns; each time is the median of its turns. One JSON line, with
the figures of each backend by row length:

    seconds            forward and backward of one layer
    prepare_seconds    what is made of the intervals, once for all layers
    dense_ratio        the dense mask's seconds over its own
    causal_share       share of plain causal attention's rate of (query, key) pairs in sight; 0.8 is wanted on a GPU
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

TURNS = 7


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device."""

    lengths: tuple[int, ...]
    tokens: int
    """Of a microbatch, whatever the row length."""
    heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


SETTINGS = {
    "cuda": Setting((2048, 8192, 16384), 32768, 32, 8, 128, torch.bfloat16),
    "cpu": Setting((256, 512, 1024), 1024, 4, 2, 32, torch.float32),
}


def backends(device: torch.device) -> dict[str, Backend[Any]]:
    """Those that train on the device."""
    if device.type == "cpu":
        return {"sdpa": DenseMask(), "segments": VariableLength(attend_by_segment)}
    from ul2r.model.attention.flex import Flex

    found: dict[str, Backend[Any]] = {"sdpa": DenseMask(), "flex": Flex()}
    if find_spec("transformer_engine"):
        found["te"] = VariableLength(TransformerEngineKernel())
    return found


def rows_of(length: int, count: int) -> Batch:
    """Rows of which the intervals matter alone."""
    objective = Objective(sequence_length=length)
    sentinels = tuple(range(4, 4 + objective.num_sentinels_needed))
    modes = {"S2S": (1,), "NLU": (2,), "NLG": (3,)}
    return build_batch(
        range(count),
        objective=objective,
        vocabulary=Vocabulary(4 + len(sentinels), 0, modes, sentinels),
        seed=1,
        text_windows=SyntheticWindows(lambda _, size: np.zeros(size)),
    )


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention, by the fastest kernel that torch has for it."""
    context = functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        is_causal=True,
        enable_gqa=True,
    )
    return context.permute(2, 0, 1, 3)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one turn, until the device is done."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(setting: Setting, length: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Figures of each backend at one row length."""
    count = setting.tokens // length
    rows = rows_of(length, count)
    shapes = (setting.heads, setting.num_kv_heads, setting.num_kv_heads, setting.heads)
    *leaves, upstream = (
        torch.randn(length, count, heads, setting.head_dim, device=device, dtype=setting.dtype)
        for heads in shapes
    )
    for leaf in leaves:
        leaf.requires_grad_()
    scale, bounds = setting.head_dim**-0.5, pack_intervals(rows.kv_start, rows.kv_end)

    def both_ways(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)

    def interval(backend: Backend[Any]) -> Callable[..., Tensor]:
        return lambda query, key, value: backend(query, key, value, bounds, scale)

    found = backends(device)
    works = {name: both_ways(interval(backend)) for name, backend in found.items()}
    works["causal"] = both_ways(causal)
    times = taken(works, device)
    kv_start, kv_end = bounds[:, 0], bounds[:, 1]
    preparing = taken(
        {name: _preparation(backend, kv_start, kv_end, device) for name, backend in found.items()},
        device,
    )
    pairs = {
        "ours": int((rows.kv_end - rows.kv_start).sum()),
        "causal": count * length * (length + 1) // 2,
    }
    return {
        name: {
            "seconds": times[name],
            "prepare_seconds": preparing[name],
            "dense_ratio": times["sdpa"] / times[name],
            "causal_share": pairs["ours"] / times[name] / (pairs["causal"] / times["causal"]),
        }
        for name in found
    }


def _preparation(
    backend: Backend[Any], kv_start: Tensor, kv_end: Tensor, device: torch.device
) -> Callable[[], object]:
    return lambda: backend.prepare(kv_start, kv_end, device)


def taken(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of each, which take turns after a first one that does not count."""
    for work in works.values():
        work()
    turns = [{name: seconds(work, device) for name, work in works.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in works}


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # a CPU's figures are one core's
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
