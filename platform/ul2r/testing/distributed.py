"""Real process groups: several processes over gloo, or this one over NCCL."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

if TYPE_CHECKING:
    from ul2r.objective.batch import Batch
    from ul2r.train.step import StepResult, TrainStep

COLLECTIVE_TIMEOUT = timedelta(seconds=120)

# The processes are forks of one that has imported what they need, which takes each of them seconds otherwise.
multiprocessing.set_forkserver_preload(["ul2r.launch.worker"])


def run_distributed(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:  # noqa: ANN401  # whatever the function takes and gives
    """Call `function(*arguments)` in `workers` fresh processes joined by gloo.

    The processes meet through a file, not a port. What one call patches in its processes, as a
    CPU's device module does, does not reach the next.

    Args:
        function: Defined at the top level of a module.
        workers: Number of processes.
        arguments: Picklable.

    Returns:
        What each rank returned, in rank order; it must be picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]  # torch has no type for it
            _enter,
            args=(Path(folder), workers, function, arguments),
            nprocs=workers,
            start_method="forkserver",
        )
        return [pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(workers)]


def join_alone(rendezvous: Path) -> None:
    """Make the default process group one of this process and its first GPU.

    Args:
        rendezvous: A file that is not there yet.
    """
    dist.init_process_group(
        "nccl",
        init_method=f"file://{rendezvous}",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )


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
    rank: int, folder: Path, workers: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo processes are CPU workers, wherever they run
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=workers,
        timeout=COLLECTIVE_TIMEOUT,
    )
    result = function(*arguments)
    _result(folder, rank).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}"
