"""A step's time split by kind, from traces written by hand in the format of torch's profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ul2r.train.monitor.step_trace import KINDS, STEP, read_split, split_step

MAIN, BACKWARD = 1, 2
STREAM, OTHER_STREAM, NCCL_STREAM = 7, 9, 20
ATTENTION, LOSS, OPTIMIZER = "ul2r.attention", "ul2r.loss", "ul2r.optimizer"


class Trace:
    """Events of one process and one GPU."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
        ]
        self.mark(STEP, 0, 1000)

    def _add(
        self, category: str, name: str, tid: int, start: float, end: float, **args: object
    ) -> None:
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 0 if "gpu" in category else 1}
            | {"tid": tid, "ts": 5000.5 + start, "dur": end - start, "args": args}
        )

    def mark(self, name: str, start: float, end: float) -> None:
        self._add("user_annotation", name, MAIN, start, end)
        # The profiler shows ranges a second time, on the GPU: no kernels.
        self._add("gpu_user_annotation", name, STREAM, start, end)

    def operate(
        self, name: str, start: float, end: float, node: int = -1, *, of_backward: bool = False
    ) -> None:
        arguments = {"Fwd thread id": int(of_backward), "Sequence number": node}
        tid = BACKWARD if of_backward else MAIN
        self._add("cpu_op", name, tid, start, end, **(arguments if node >= 0 else {}))

    def launch(
        self,
        at: float,
        name: str,
        start: float,
        end: float,
        *,
        tid: int = MAIN,
        stream: int = STREAM,
    ) -> None:
        """Add a kernel and the call that starts it."""
        correlation = len(self.events)
        self._add("cuda_runtime", "cudaLaunchKernel", tid, at, at + 1, correlation=correlation)
        self._add(
            "gpu_memcpy" if name.startswith("Memcpy") else "kernel",
            name,
            stream,
            start,
            end,
            correlation=correlation,
            stream=stream,
        )


@pytest.fixture
def trace() -> Trace:
    trace = Trace()
    # Left by the step before; who launched it was not recorded.
    trace._add("kernel", "vectorized_elementwise_kernel", STREAM, -50, 5, correlation=99_999)

    trace.operate("aten::mm", 10, 20, node=5)
    trace.launch(12, "sm90_xmma_gemm_bf16bf16_bf16f32", 20, 120)
    trace.mark(ATTENTION, 30, 50)
    trace.operate("CompiledFunction", 32, 40, node=6)
    trace.launch(35, "triton_tem_fused_0", 120, 220)
    # Makes no node: the next operator, outside of the range, makes the one of this number.
    trace.operate("aten::detach", 45, 46, node=7)
    trace.operate("aten::mul", 55, 58, node=7)
    trace.mark(LOSS, 60, 80)
    trace.operate("_VocabParallelCrossEntropy", 61, 70, node=8)
    trace.launch(62, "reduce_kernel", 220, 260)
    trace.launch(72, "nvjet_tst_128x256_64x4", 260, 300)

    for node, at, name, start, end in (
        (8, 400, "vectorized_elementwise_kernel", 420, 450),
        (6, 450, "triton_poi_fused_zeros_1", 450, 500),
        (7, 500, "vectorized_elementwise_kernel", 500, 520),
    ):
        trace.operate("autograd::engine::evaluate_function", at, at + 20, node, of_backward=True)
        # An operator within, with a number of its own kind.
        trace.operate("aten::sum", at + 1, at + 10)
        trace.launch(at + 2, name, start, end, tid=BACKWARD)
    trace.launch(470, "ncclDevKernel_ReduceScatter", 480, 560, tid=BACKWARD, stream=NCCL_STREAM)

    trace.launch(590, "cutlass_80_wmma_tensorop", 640, 680, stream=OTHER_STREAM)
    trace.mark(OPTIMIZER, 600, 630)
    trace.launch(602, "multi_tensor_apply_kernel", 620, 660)
    trace.launch(690, "Memcpy HtoD (Pinned -> Device)", 700, 720)
    return trace


def test_kernels_count_for_the_range_that_launched_them_and_gaps_for_waiting(trace: Trace) -> None:
    split = split_step(trace.events)
    microseconds = {kind: round(1e6 * seconds, 3) for kind, seconds in split.seconds.items()}
    assert split.device == "cuda"
    assert microseconds == {
        "matrix products": 100 + 40 + 10 + 20,  # half of the 20 beside the optimizer
        "attention": 100 + 50,
        "elementwise": 5 + 20,
        "loss": 40 + 30,
        "optimizer": 20 + 10,
        "copies": 20,
        "communication": 40,  # of 80: the rest is behind other kernels
        "waiting": 495,
    }
    assert split.wall_seconds == pytest.approx(1e-3)
    assert sum(split.fractions().values()) == pytest.approx(1)


def test_kernels_of_one_name_are_listed_by_kind_with_their_whole_time(trace: Trace) -> None:
    kernels = split_step(trace.events).kernels
    found = {(k.name, k.kind): (k.num_calls, round(1e6 * k.seconds)) for k in kernels}
    assert found["vectorized_elementwise_kernel", "elementwise"] == (2, 25)
    assert found["vectorized_elementwise_kernel", "loss"] == (1, 30)
    assert found["ncclDevKernel_ReduceScatter", "communication"] == (1, 80)
    assert [k.seconds for k in kernels] == sorted((k.seconds for k in kernels), reverse=True)


def test_operators_of_a_cpu_count_without_those_that_they_call() -> None:
    trace = Trace()
    trace.operate("aten::linear", 100, 400, node=1)
    trace.operate("aten::t", 110, 120, node=1)
    trace.operate("aten::mm", 150, 380, node=1)
    trace.mark(LOSS, 500, 700)
    trace.operate("aten::exp", 520, 680, node=2)
    trace.operate(
        "autograd::engine::evaluate_function: ExpBackward0", 800, 900, 2, of_backward=True
    )
    trace.operate("aten::matmul", 950, 960)

    split = split_step(trace.events)

    assert split.device == "cpu"
    microseconds = {
        kind: round(1e6 * seconds) for kind, seconds in split.seconds.items() if seconds
    }
    assert microseconds == {
        "matrix products": 290 + 10,
        "elementwise": 10,
        "loss": 160 + 100,
        "waiting": 1000 - 300 - 10 - 260,
    }
    calls = {kernel.name: kernel.num_calls for kernel in split.kernels}
    assert calls["aten::linear"] == calls["aten::mm"] == 1


def test_a_file_is_read_as_it_was_written(trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "step.json.gz"
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": trace.events}, stream)
    split = read_split(file)
    assert split == split_step(trace.events)

    table = split.format_table(num_kernels=1)
    assert all(kind in table for kind in KINDS)
    assert "49.5%" in table
    assert table.splitlines()[-1].split()[-1] == split.kernels[0].name


def test_a_trace_without_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 ranges ul2r\.step"):
        split_step(Trace().events[:1])
