"""Seconds of a run's training step, measured on this machine before the run is started."""

from __future__ import annotations

import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from ul2r.config import Recipe
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import LayoutError
from ul2r.train.mesh import Mesh
from ul2r.train.step import TrainStep
from ul2r.workflows.dry_run import build_blank_batch

NUM_WARMUP_STEPS = 1
NUM_STEPS = 2
INITIAL_SCALE = 0.02
"""Standard deviation of the weights, which stand for the base's: the time does not depend on them."""


def measure_step_seconds(recipe: Recipe) -> float:
    """Take a few steps in the recipe's layout, on rows without text, and return the median seconds of one.

    The recipe's store must be prepared. Nothing is written.

    Raises:
        LayoutError: If a worker fails, for example for lack of memory.
    """
    num_workers = recipe.parallel.num_workers
    vocabulary_size = open_dataset(recipe.storage_paths.store).vocabulary.size
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds"
        # In processes of their own: Megatron-Core and CUDA leave their marks in the process that they are used in.
        # Daemons end with this one, however it ends.
        try:
            start_processes(  # type: ignore[no-untyped-call]  # torch has no type for it
                _take_steps,
                args=(recipe, vocabulary_size, Path(folder) / "rendezvous", result),
                nprocs=num_workers,
                daemon=True,
                start_method="spawn",
            )
        except (ProcessRaisedException, ProcessExitedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise LayoutError(
                f"a step cannot be taken on this machine ({reason}): change parallel, kernels or "
                "training.micro_batch_size in the recipes"
            ) from error
        return float(result.read_text(encoding="ascii"))


def _take_steps(
    rank: int, recipe: Recipe, vocabulary_size: int, rendezvous: Path, result: Path
) -> None:
    on_gpu = bool(recipe.launch.gpus_per_worker)
    device = torch.device("cuda", rank) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(int(recipe.launch.cpus_per_worker), 1))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=recipe.parallel.num_workers,
        timeout=timedelta(minutes=10),
        device_id=device,
    )
    mesh = Mesh.join(recipe.parallel)
    train_step = TrainStep(recipe, mesh, vocabulary_size)
    with torch.no_grad():
        for chunk in train_step.chunks:
            for weight in chunk.parameters():
                weight.normal_(0, INITIAL_SCALE)
    train_step.optimizer.reload_model_params()

    batch = build_blank_batch(recipe, recipe.training.global_batch_size // recipe.parallel.data)
    seconds = []
    for step in range(NUM_WARMUP_STEPS + NUM_STEPS):
        start = time.perf_counter()
        # Its losses are known to the host when the device has finished.
        train_step.forward_backward(step, batch)
        train_step.optimizer_step()
        seconds.append(time.perf_counter() - start)

    if mesh.is_rank0:
        median = statistics.median(seconds[NUM_WARMUP_STEPS:])
        result.write_text(f"{median}\n", encoding="ascii")
    mesh.leave()
    dist.destroy_process_group()
