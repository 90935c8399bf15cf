"""Checkpoints written from a device in the background."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ul2r.config import Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import open_dataset
from ul2r.testing.distributed import take_step
from ul2r.testing.gpu import gpu_recipe
from ul2r.train.checkpoint.async_write import AsyncWrite
from ul2r.train.checkpoint.sharded_state import load_checkpoint, start_save
from ul2r.train.mesh import Mesh
from ul2r.train.optimizer import unwrap_chained_optimizer
from ul2r.train.step import TrainStep

pytestmark = pytest.mark.gpu


def copy_state(train_step: TrainStep) -> dict[str, Tensor]:
    """Copy weights, and the optimizer's weights and moments, to host memory."""
    weights = {
        f"weight {name}": parameter.detach().to("cpu", copy=True)
        for chunk in train_step.chunks
        for name, parameter in chunk.named_parameters()
    }
    distributed = unwrap_chained_optimizer(train_step.optimizer)
    states = {
        f"{kind} {name}": values.detach().to("cpu", copy=True)
        for chunk in train_step.chunks
        for name, parameter in chunk.named_parameters()
        for kind, values in distributed._get_main_param_and_optimizer_states(parameter).items()
        if isinstance(values, Tensor) and values.dim() > 0
    }
    return weights | states


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_checkpoint_holds_its_step_while_training_goes_on(
    storage: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Files are written only after two more steps: weights and moments are still those of the step, bit for bit."""
    may_write = threading.Event()
    write_file = AsyncWrite._write_file

    def wait_and_write(self: AsyncWrite, *arguments: object) -> object:
        assert may_write.wait(timeout=60)
        return write_file(self, *arguments)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(AsyncWrite, "_write_file", wait_and_write)
    recipe: Recipe = gpu_recipe(storage, training={"precision": precision})
    dataset = open_dataset(recipe.storage_paths.store)
    builder = BatchBuilder(recipe, dataset)
    batches = [builder.build(number, 0, 1) for number in range(4)]
    mesh = Mesh.join(recipe.parallel)
    try:
        train_step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        for step in range(2):
            take_step(train_step, step, batches[step])

        # No wait for the device in between: the next step's kernels are queued right behind the copies.
        folder = storage / "checkpoint"
        folder.mkdir()
        saved = copy_state(train_step)
        write = start_save(folder, train_step)
        losses = [take_step(train_step, step, batches[step]).losses.mean for step in (2, 3)]
        assert not write.is_done
        may_write.set()
        assert write.wait() is None
        write.finalize()
        changed = copy_state(train_step)

        resumed = TrainStep(recipe, mesh, dataset.vocabulary.size)
        load_checkpoint(folder, resumed, optimizer=True)
        loaded = copy_state(resumed)
        again = [take_step(resumed, step, batches[step]).losses.mean for step in (2, 3)]
    finally:
        may_write.set()
        mesh.leave()

    assert {name.split()[0] for name in saved} >= {"weight", "param", "exp_avg", "exp_avg_sq"}
    for name, values in saved.items():
        assert torch.equal(loaded[name], values), name
        assert not torch.equal(changed[name], values), name
    assert again == pytest.approx(losses, rel=1e-2 if precision == "bf16" else 1e-5)
