"""Training on one CUDA device, over NCCL, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ul2r.config import Parallel, Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.launch.worker import run_worker
from ul2r.testing.distributed import run_distributed
from ul2r.testing.gpu import get_device, gpu_recipe, is_rehearsal
from ul2r.testing.recipes import GEMMA_3
from ul2r.tracking.tracker import MemoryTracker
from ul2r.train.mesh import Mesh

pytestmark = pytest.mark.gpu

Records = list[tuple[int, dict[str, float]]]

MODELS = {
    "Llama": {},
    "Gemma 3": GEMMA_3,
    "PaLM": {"block": "parallel", "norm": "layer", "norm_bias": False, "num_kv_heads": 1},
    "Mixtral": {"num_experts": 4, "num_experts_per_token": 2},
}


def train(recipe: Recipe) -> Records:
    tracker = MemoryTracker()
    run_worker(recipe, tracker)
    return tracker.records


def select_losses(records: Records) -> dict[tuple[int, str], float]:
    """Return losses and gradient norms by step and name."""
    return {
        (step, name): value
        for step, metrics in records
        for name, value in metrics.items()
        if "loss" in name or name == "train/grad_norm"
    }


@pytest.mark.parametrize("name", MODELS)
def test_run_in_fp32_equals_a_run_on_the_cpu(storage: Path, name: str) -> None:
    """All losses, held-out ones included, and gradient norms of six steps: only the order of sums differs."""

    def make_recipe(run: str) -> Recipe:
        return gpu_recipe(
            storage,
            name=run,
            model=MODELS[name],
            training={"precision": "fp32"},
            # A step of Adam is the learning rate in the direction of the gradient, also where that is all rounding.
            optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-4},
        )

    found = select_losses(train(make_recipe("device")))
    (on_cpu,) = run_distributed(train, 1, make_recipe("cpu"))
    expected = select_losses(on_cpu)
    assert len([key for key in expected if key[1] == "train/loss"]) == 6
    assert found == pytest.approx(expected, rel=1e-4)


def test_run_learns_in_bf16_and_resumes_from_its_checkpoint(storage: Path) -> None:
    recipe = gpu_recipe(storage)
    assert recipe.precision == "bf16"
    whole = train(recipe)
    (recipe.paths.checkpoints / "latest").write_text("step_00000003")
    resumed = train(recipe)

    losses = [metrics["train/loss"] for _, metrics in whole if "train/loss" in metrics]
    again = [metrics["train/loss"] for _, metrics in resumed if "train/loss" in metrics]
    assert losses[-1] < losses[0]
    assert again == pytest.approx(losses[3:], rel=1e-2)
    (memory, *_) = (metrics["train/memory_gib"] for _, metrics in whole if "train/loss" in metrics)
    assert memory > 0
    if not is_rehearsal():
        assert torch.cuda.max_memory_allocated() > 0


def test_collectives_of_one_rank_return_what_they_are_given(storage: Path) -> None:
    """Over NCCL: objects, numbers and a batch; the groups are Megatron-Core's."""
    assert dist.get_backend() == ("gloo" if is_rehearsal() else "nccl")
    recipe = gpu_recipe(storage)
    mesh = Mesh.join(Parallel())
    try:
        assert mesh.device == get_device()
        assert mesh.is_reader
        assert mesh.is_last_stage
        assert mesh.broadcast_from_rank0(lambda: {"step": 3}) == {"step": 3}
        assert mesh.all_gather(("a", 1.5)) == [("a", 1.5)]
        assert mesh.all_reduce_max(4, 0, -2) == [4, 0, -2]
        values = torch.tensor([1e-300, 2.0**60 + 2**10], dtype=torch.float64, device=mesh.device)
        assert mesh.all_reduce_sum(values.clone()).tolist() == values.tolist()

        batch = BatchBuilder(recipe, open_dataset(recipe.storage_paths.store)).build(0, 0, 1)
        # A mesh of more ranks than there are sends the batch through device memory, here to itself.
        sent = replace(mesh, parallel=Parallel(num_workers=2, tensor=2)).broadcast_batch(batch)
        assert sent is not None
        for name, array in batch.to_arrays().items():
            np.testing.assert_array_equal(sent.to_arrays()[name], array)
        from megatron.core import parallel_state  # prepared by the modules above

        group = parallel_state.get_data_parallel_group()
        assert dist.get_backend(group) == dist.get_backend()
    finally:
        mesh.leave()
