"""Training on one CUDA device, over NCCL, without Ray. Has not been run yet: no machine with a GPU was at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ul2r.launch.worker import run_worker
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import init_single_gpu_group
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu


def test_run_learns_in_bf16_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store")
    recipe = tiny_recipe(tmp_path, launch={"gpus_per_worker": 1})
    init_single_gpu_group(tmp_path / "rendezvous")
    try:
        whole = MemoryTracker()
        run_worker(recipe, whole)
        checkpoints = recipe.paths.checkpoints
        (checkpoints / "latest").write_text("step_00000003")
        resumed = MemoryTracker()
        run_worker(recipe, resumed)
    finally:
        dist.destroy_process_group()
    losses = [value for _, value in whole.series("train/loss")]
    again = [value for _, value in resumed.series("train/loss")]
    assert losses[-1] < losses[0]
    assert again == pytest.approx(losses[3:], rel=1e-2)
    assert torch.cuda.max_memory_allocated() > 0
