"""Wall time of a step split by what the device did, from a trace of torch's profiler.

A kernel belongs to attention, loss or optimizer if the code that launched it runs in a range of that name
(`label_kernels`), or if it is the backward pass of such code; otherwise its name decides. On a CPU the operators
themselves, without those that they call, take the place of kernels.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from ul2r.model.attention.core import IntervalAttention
from ul2r.train import step as train_step_module
from ul2r.train.step import TrainStep

STEP = "ul2r.step"
"""Range of the whole step; it has to end when the device has finished."""
RANGES = {"ul2r.attention": "attention", "ul2r.loss": "loss", "ul2r.optimizer": "optimizer"}
"""Kind of the kernels that are launched in a range."""
KINDS = (
    "matrix products",
    "attention",
    "elementwise",
    "loss",
    "optimizer",
    "copies",
    "communication",
    "waiting",
)
"""Elementwise is all that is nothing else: norms, rotary embeddings, activations, sums. Waiting: no kernel runs."""
BACKGROUND = frozenset({"copies", "communication"})
"""Kinds that count only where no other kernel runs at the same time: what they cost."""

_NAMES = (
    (
        "communication",
        re.compile(r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter", re.I),
    ),
    # FlexAttention's templates are called after the operator that they compute, the others by their authors.
    ("attention", re.compile(r"flash|fmha|attention|flex|sdpa", re.I)),
    # cuBLAS, CUTLASS, cuDNN and Triton; torch's operators on a CPU.
    (
        "matrix products",
        re.compile(
            r"gemm|gemv|cutlass|nvjet|cublas|wgmma|split_?k|triton_tem_.*mm|"
            r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear|addmv|mv)$",
            re.I,
        ),
    ),
    ("copies", re.compile(r"^memcpy|^memset", re.I)),
)
_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
_HOST_RANGES = frozenset({"cpu_op", "user_annotation"})

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """One kernel, or on a CPU a part of an operator in which it calls no other; times in microseconds.

    Attributes:
        name: Name of the kernel or operator.
        kind: One of `KINDS`.
        start: When it starts.
        end: When it ends.
        is_last: False for parts of an operator but the last.
    """

    name: str
    kind: str
    start: float
    end: float
    is_last: bool = True


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in a step.

    Attributes:
        name: Its name.
        kind: One of `KINDS`.
        num_calls: Number of calls.
        seconds: Summed time of all calls; concurrent ones count in full.
    """

    name: str
    kind: str
    num_calls: int
    seconds: float


@dataclass(frozen=True)
class StepSplit:
    """Wall time of a step by kind of work.

    Attributes:
        device: "cuda" or "cpu".
        seconds: By kind, all of `KINDS`; their sum is the wall time.
        kernels: Longest first.
    """

    device: str
    seconds: Mapping[str, float]
    kernels: Sequence[Kernel]

    @property
    def wall_seconds(self) -> float:
        """Wall time of the step."""
        return sum(self.seconds.values())

    def fractions(self) -> dict[str, float]:
        """Return the fraction of the wall time of each kind."""
        return {kind: seconds / self.wall_seconds for kind, seconds in self.seconds.items()}

    def format_table(self, num_kernels: int = 20) -> str:
        """Return text to print: the kinds, then the longest kernels."""
        lines = [f"{'':<16} {'ms':>10} {'share':>7}"]
        for kind, seconds in self.seconds.items():
            lines.append(f"{kind:<16} {seconds * 1e3:>10.3f} {seconds / self.wall_seconds:>7.1%}")
        lines.append(f"{'step':<16} {self.wall_seconds * 1e3:>10.3f}")
        lines += ["", f"{'ms':>10} {'calls':>6}  {'kind':<16} kernel"]
        for kernel in self.kernels[:num_kernels]:
            name = kernel.name if len(kernel.name) <= 100 else f"{kernel.name[:97]}..."
            lines.append(
                f"{kernel.seconds * 1e3:>10.3f} {kernel.num_calls:>6}  {kernel.kind:<16} {name}"
            )
        return "\n".join(lines)


@contextmanager
def label_kernels(train_step: TrainStep) -> Iterator[None]:
    """Open the ranges of `RANGES` around attention, loss and optimizer while the block runs."""
    targets: list[tuple[object, str, str]] = [
        (train_step_module, "_loss", "ul2r.loss"),
        (train_step, "optimizer_step", "ul2r.optimizer"),
        # In `forward_backward`, since the guards look at the norm first.
        *(
            (train_step.optimizer, name, "ul2r.optimizer")
            for name in ("zero_grad", "prepare_grads", "get_grad_norm")
        ),
    ]
    for model, chunk in zip(train_step.model, train_step.chunks, strict=True):
        targets.append((model, "zero_grad_buffer", "ul2r.optimizer"))
        targets.append((chunk, "compute_language_model_loss", "ul2r.loss"))
        targets += [
            (module, "forward", "ul2r.attention")
            for module in chunk.modules()
            if isinstance(module, IntervalAttention)
        ]

    originals = [vars(owner).get(name) for owner, name, _ in targets]
    for owner, name, label in targets:
        setattr(owner, name, _label(getattr(owner, name), label))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(targets, originals, strict=True):
            # Methods are the class's again.
            delattr(owner, name) if original is None else setattr(owner, name, original)


def _label(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @wraps(function)
    def labeled(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  the function's own
        with record_function(label):
            return function(*arguments, **keywords)

    return labeled


def read_split(path: Path) -> StepSplit:
    """Read the trace of a step, which torch's `export_chrome_trace` wrote (.json or .json.gz), and split it."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return split_step(json.load(file)["traceEvents"])


def split_step(events: Sequence[Event]) -> StepSplit:
    """Split the wall time of the range `STEP`.

    At each moment the time counts for the kinds of the kernels that run, in equal parts; those of `BACKGROUND` count
    only where no others run.

    Args:
        events: A trace's `traceEvents`.

    Raises:
        ValueError: If it does not have one range `STEP`.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    steps = [e for e in spans if e.get("cat") == "user_annotation" and e["name"] == STEP]
    if len(steps) != 1:
        raise ValueError(f"{len(steps)} ranges {STEP} in the trace, not one")
    begin = float(steps[0]["ts"])
    end = begin + float(steps[0]["dur"])

    on_device = any(event.get("cat") in _DEVICE_WORK for event in spans)
    labels = _LaunchLabels(spans)
    found = _list_kernels(spans, labels) if on_device else _list_operators(spans, labels)
    # What an earlier step left on the device is cut off.
    works = [
        replace(work, start=max(work.start, begin), end=min(work.end, end))
        for work in found
        if work.start < end and work.end > begin
    ]
    return StepSplit(
        device="cuda" if on_device else "cpu",
        seconds={kind: us / 1e6 for kind, us in _sum_by_kind(works, begin, end).items()},
        kernels=_sum_by_kernel(works),
    )


def _sum_by_kind(works: Sequence[Work], begin: float, end: float) -> dict[str, float]:
    """Return the microseconds of each kind between `begin` and `end`."""
    # At one moment ends come before starts, so that neighbors do not overlap.
    edges = sorted(
        [(work.start, 1, work.kind) for work in works]
        + [(work.end, -1, work.kind) for work in works],
        key=lambda edge: edge[:2],
    )
    totals = dict.fromkeys(KINDS, 0.0)
    running = dict.fromkeys(KINDS, 0)
    now = begin
    for time, change, kind in [*edges, (end, 0, "waiting")]:
        active = {name: count for name, count in running.items() if count}
        foreground = {name: n for name, n in active.items() if name not in BACKGROUND}
        counted = foreground or active or {"waiting": 1}
        for name, count in counted.items():
            totals[name] += (time - now) * count / sum(counted.values())
        now = time
        running[kind] += change
    return totals


def _sum_by_kernel(works: Sequence[Work]) -> list[Kernel]:
    num_calls: defaultdict[tuple[str, str], int] = defaultdict(int)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for work in works:
        num_calls[work.name, work.kind] += work.is_last
        seconds[work.name, work.kind] += (work.end - work.start) / 1e6
    kernels = [Kernel(*key, num_calls[key], seconds[key]) for key in seconds]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def _list_kernels(spans: Sequence[Event], labels: _LaunchLabels) -> list[Work]:
    """Return the kernels and copies of all streams of a GPU."""
    launches = {
        event["args"]["correlation"]: event
        for event in spans
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    works = []
    for event in spans:
        if event.get("cat") in _DEVICE_WORK:
            launch = launches.get(event["args"].get("correlation"))
            label = None if launch is None else labels.of_event(launch)
            works.append(_make_work(event, label))
    return works


def _list_operators(spans: Sequence[Event], labels: _LaunchLabels) -> list[Work]:
    """Return the operators of a CPU, each without those that it calls."""
    works = []
    for thread in _group_by_thread(spans).values():
        operators = [event for event in thread if event["cat"] == "cpu_op"]
        stack: list[tuple[Event, float]] = []  # operator, and where the next part of its own begins

        def close(until: float, stack: list[tuple[Event, float]] = stack) -> None:
            while stack and _end_of(stack[-1][0]) <= until:
                event, own_start = stack.pop()
                works.append(_make_work(event, labels.of_event(event), own_start, _end_of(event)))
                if stack:
                    stack[-1] = (stack[-1][0], _end_of(event))

        for event in operators:
            close(event["ts"])
            if stack:
                parent, own_start = stack[-1]
                part = _make_work(parent, labels.of_event(parent), own_start, event["ts"])
                works.append(replace(part, is_last=False))
            stack.append((event, event["ts"]))
        close(float("inf"))
    return works


def _make_work(
    event: Event, label: str | None, start: float | None = None, end: float | None = None
) -> Work:
    name = str(event["name"])
    kind = next((kind for kind, pattern in _NAMES if pattern.search(name)), "elementwise")
    # The loss may be fused with the last matrix product, which stays what it is.
    is_product_of_loss = label == "loss" and kind == "matrix products"
    if label is not None and kind != "communication" and not is_product_of_loss:
        kind = label
    return Work(
        name,
        kind,
        event["ts"] if start is None else start,
        _end_of(event) if end is None else end,
    )


class _LaunchLabels:
    """Kind of the range in which each host event runs, or whose backward pass it belongs to.

    Autograd numbers its nodes when the forward pass makes them. torch's profiler notes the next number with every
    forward operator, and a node's own with the operators of its backward pass ("Sequence number"; "Fwd thread id" is
    above 0 there). Of the operators with the same number the last one made the node.
    """

    def __init__(self, spans: Sequence[Event]) -> None:
        self._labels: dict[int, str | None] = {}
        backward: list[tuple[Event, int]] = []
        forward: dict[int, tuple[float, str | None]] = {}

        for thread in _group_by_thread(spans).values():
            stack: list[tuple[Event, str | None, int | None]] = []
            for event in thread:
                while stack and _end_of(stack[-1][0]) <= event["ts"]:
                    stack.pop()
                label, node = (stack[-1][1], stack[-1][2]) if stack else (None, None)
                arguments = event.get("args", {})
                if event["cat"] == "user_annotation":
                    label = RANGES.get(event["name"], label)
                number = arguments.get("Sequence number", -1)
                if number >= 0 and arguments.get("Fwd thread id", 0) > 0:
                    node = number
                elif number >= 0 and event["ts"] >= forward.get(number, (0.0, None))[0]:
                    forward[number] = (event["ts"], label)
                stack.append((event, label, node))
                self._labels[id(event)] = label
                if label is None and node is not None:
                    backward.append((event, node))

        for event, node in backward:
            self._labels[id(event)] = forward.get(node, (0.0, None))[1]

    def of_event(self, event: Event) -> str | None:
        """Return the kind, None if no range has an opinion."""
        return self._labels.get(id(event))


def _group_by_thread(spans: Sequence[Event]) -> dict[tuple[Any, Any], list[Event]]:
    """Return the host's events by thread, each after those that enclose it."""
    threads: defaultdict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in spans:
        if event.get("cat") in _HOST_RANGES | _LAUNCHES:
            threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
    return dict(threads)


def _end_of(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])
