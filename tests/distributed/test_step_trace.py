"""A real step's trace: the parts of the model and of the train step that kernels are attributed to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.monitor.step_trace import StepSplit

pytestmark = pytest.mark.distributed


def record_step(storage: Path) -> tuple[StepSplit, list[str]]:
    """Record the second of three steps; return its split and the names that are still labeled afterwards."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.testing.distributed import take_step
    from ul2r.train.mesh import Mesh
    from ul2r.train.monitor.step_trace import STEP, label_kernels, read_split
    from ul2r.train.step import TrainStep

    recipe = tiny_recipe(storage)
    dataset = open_dataset(recipe.storage_paths.store)
    batches = BatchBuilder(recipe, dataset)
    train_step = TrainStep(recipe, Mesh.join(recipe.parallel), dataset.vocabulary.size)
    take_step(train_step, 0, batches.build(0))
    with (
        label_kernels(train_step),
        profile(activities=[ProfilerActivity.CPU]) as recording,
        record_function(STEP),
    ):
        take_step(train_step, 1, batches.build(1))
    file = storage / "step.json.gz"
    recording.export_chrome_trace(str(file))

    take_step(train_step, 2, batches.build(2))
    owners = (train_step, train_step.optimizer, *train_step.model, *train_step.chunks)
    return read_split(file), [
        name
        for owner in owners
        for name, value in vars(owner).items()
        if hasattr(value, "__wrapped__")
    ]


def test_a_step_is_split_into_its_parts(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store")
    ((split, labeled),) = run_distributed(record_step, 1, tmp_path)
    assert labeled == []

    kinds: dict[str, set[str]] = {}
    for kernel in split.kernels:
        kinds.setdefault(kernel.name, set()).add(kernel.kind)
    # Adam's square root, in no other part of the model.
    assert kinds["aten::sqrt"] == {"optimizer"}
    # Megatron-Core's loss takes the exponential of the logits in place; its backward pass is the loss's, too.
    assert kinds["aten::exp"] == {"loss"}
    assert "loss" in kinds["_VocabParallelCrossEntropyBackward"]
    # SwiGLU's sigmoid and its backward pass.
    assert kinds["aten::silu_backward"] == {"elementwise"}
    assert kinds["aten::mm"] == {"matrix products"}
    # Forward and backward pass of the dense mask's kernel, and what goes with it.
    assert "attention" in kinds["aten::transpose"]
    assert all(split.seconds[kind] > 0 for kind in ("attention", "loss", "optimizer", "waiting"))
