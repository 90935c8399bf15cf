"""Process groups of several processes over gloo, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

if TYPE_CHECKING:
    from ul2r.objective.batch import Batch
    from ul2r.train.step import StepResult, TrainStep

COLLECTIVE_TIMEOUT = timedelta(seconds=120)

# Processes are forked from a server that has imported the worker's modules: each would need seconds for it otherwise.
# The others are what numba imports when a compiled function is first called.
multiprocessing.set_forkserver_preload(
    ["ul2r.launch.worker", "scipy.linalg.cython_blas", "numba.np.arraymath", "numba.np.arrayobj"]
)


def run_distributed(
    function: Callable[..., Any],
    num_workers: int,
    *arguments: Any,  # noqa: ANN401  whatever the function takes
) -> list[Any]:
    """Call `function(*arguments)` in `num_workers` new processes that form a gloo process group.

    The processes meet through a file rather than a port. Patches of one call, such as the CPU as a device of
    Megatron-Core, do not reach the next.

    Args:
        function: Function at the top level of a module.
        num_workers: Number of processes.
        arguments: Its arguments, which must be picklable.

    Returns:
        The return values in rank order, which must be picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first rank that failed.
    """
    _start_fork_server()
    # Results come back as files, since `start_processes` returns none. It joins the processes, so all of them are
    # written.
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]  # torch has no type for it
            _enter,
            args=(Path(folder), num_workers, function, arguments),
            nprocs=num_workers,
            # fork would copy a process with running threads and their locks; spawn would import everything again.
            start_method="forkserver",
        )
        return [
            pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(num_workers)
        ]


def _start_fork_server() -> None:
    """Start the server from which processes are forked, unless it is running, in an environment without GPUs.

    Megatron-Core 0.19 asks CUDA for devices when it is imported. Processes forked after that would have the server's
    answer, and could not use CUDA: an empty CUDA_VISIBLE_DEVICES of their own would come too late.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        forkserver.ensure_running()
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def take_step(train_step: TrainStep, step: int, batch: Batch) -> StepResult:
    """Take a training step without guards.

    Args:
        train_step: Model and optimizer of this rank.
        step: Number of the step, from 0.
        batch: This replica's rows.
    """
    result = train_step.forward_backward(step, batch)
    train_step.optimizer_step()
    return result


def _enter(
    rank: int,
    folder: Path,
    num_workers: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # gloo workers train on CPUs, on a machine with GPUs as well; here for a fork server that others started.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The workers share the machine's cores; torch would start a thread per core in each.
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=num_workers,
        timeout=COLLECTIVE_TIMEOUT,
    )
    # No barrier and no cleanup after an exception: the group's other ranks may be waiting in a collective, and
    # `start_processes` ends them.
    result = function(*arguments)
    _result(folder, rank).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}"
