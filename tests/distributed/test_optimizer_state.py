"""Optimizer state as boxes holds what Megatron-Core gathers, and each can load what the other has saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul2r.config import Recipe
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader
from ul2r.model.tensors import iter_tensors
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.optimizer_state import split_into_boxes

if TYPE_CHECKING:
    from ul2r.train.step import TrainStep

pytestmark = pytest.mark.distributed

EXPERTS = {"family": "mixtral", "num_experts": 4, "num_experts_per_token": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 3": {
        "parallel": {"num_workers": 3},
        "training": {"global_batch_size": 6},
        "validation": {"num_rows": 6},
    },
    "DP 2 x TP 2 x SP, experts": {
        "parallel": {"num_workers": 4, "tensor": 2, "sequence_parallel": True},
        "model": {**EXPERTS, "tie_embeddings": False},
    },
}
NUM_STEPS = 2


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """Draw the shape of a tensor, and the start and end of a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    size = math.prod(shape)
    start = draw(st.integers(0, size - 1))
    return shape, start, draw(st.integers(start + 1, size))


@given(ranges())
def test_boxes_hold_the_elements_of_a_range_in_order(
    drawn: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = drawn
    tensor = np.arange(math.prod(shape)).reshape(shape)
    boxes = [
        tensor[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))].ravel()
        for offset, size in split_into_boxes(shape, start, stop)
    ]
    np.testing.assert_array_equal(np.concatenate(boxes), np.arange(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


def test_example_of_the_docstring() -> None:
    assert list(split_into_boxes((3, 4), 2, 10)) == [
        ((0, 2), (1, 2)),
        ((1, 0), (1, 4)),
        ((2, 0), (1, 2)),
    ]


def save_from_small_buckets(recipe: Recipe, folder: Path) -> int:
    """Save and load with several gradient buckets per buffer, as large models have.

    Returns:
        Number of buckets.
    """
    from torch import distributed

    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.checkpoint.sharded_state import load_checkpoint, start_save
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    mesh, dataset = Mesh.join(recipe.parallel), open_dataset(recipe.storage_paths.store)
    step, other = (TrainStep(recipe, mesh, dataset.vocabulary.size) for _ in range(2))
    take_step(step, 0, BatchBuilder(recipe, dataset).build(0, mesh.data_rank, recipe.parallel.data))
    check_pieces(step)
    if mesh.is_rank0:
        folder.mkdir()
    distributed.barrier()
    write = start_save(folder, step)
    assert write.wait() is None
    write.finalize()
    distributed.barrier()
    load_checkpoint(folder, other, optimizer=True)
    check_equal(other, step)
    return sum(len(chunk.bucket_groups) for chunk in step.model)


def exchange(recipe: Recipe, folder: Path) -> None:
    """Train, save as boxes and as Megatron-Core does, and load each the other way; runs on every rank."""
    from megatron.core import dist_checkpointing, parallel_state
    from torch import distributed

    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.model.build import make_sharded_state_dict, make_sharding_metadata
    from ul2r.train.checkpoint.async_write import AsyncWrite
    from ul2r.train.checkpoint.sharded_state import load_checkpoint, start_save
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    def shard_as_megatron(step: TrainStep, *, loading: bool) -> dict[str, Any]:
        model = make_sharded_state_dict(step.chunks)
        metadata = {**make_sharding_metadata(), "distrib_optim_sharding_type": "fully_reshardable"}
        state = step.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": state}

    mesh, dataset = Mesh.join(recipe.parallel), open_dataset(recipe.storage_paths.store)
    step, other = (TrainStep(recipe, mesh, dataset.vocabulary.size) for _ in range(2))
    batches = BatchBuilder(recipe, dataset)
    for number in range(NUM_STEPS):
        take_step(step, number, batches.build(number, mesh.data_rank, recipe.parallel.data))
    check_pieces(step)
    gathered = shard_as_megatron(step, loading=False)
    whole = {
        (number, kind): shard.data.clone()
        for number, kinds in gathered["optimizer"]["param_state"].items()
        for kind, shard in kinds.items()
    }
    if mesh.is_rank0:
        (folder / "boxes").mkdir(parents=True)
        (folder / "megatron").mkdir()
    distributed.barrier()
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writes = (
        start_save(folder / "boxes", step),
        AsyncWrite(gathered, folder / "megatron", replicas),
    )
    assert [write.wait() for write in writes] == [None, None]
    # In the other order: each write must know its own results.
    for write in reversed(writes):
        write.finalize()
    distributed.barrier()

    loaded = dist_checkpointing.load(shard_as_megatron(other, loading=True), str(folder / "boxes"))
    for (number, kind), expected in whole.items():
        assert torch.equal(loaded["optimizer"]["param_state"][number][kind], expected), kind

    load_checkpoint(folder / "megatron", other, optimizer=True)
    check_equal(other, step)
    assert {float(state["step"]) for state in list_states(other)} == {NUM_STEPS}
    take_step(other, NUM_STEPS, batches.build(NUM_STEPS, mesh.data_rank, recipe.parallel.data))
    assert {float(state["step"]) for state in list_states(other)} == {NUM_STEPS + 1}


def check_pieces(step: TrainStep) -> None:
    """Check that the pieces share memory with the optimizer's own tensors, and cover each element once."""
    from ul2r.model.build import make_sharded_state_dict
    from ul2r.train.checkpoint.optimizer_state import shard_optimizer_state

    def addresses(tensors: list[torch.Tensor]) -> list[int]:
        blocks = ((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        return sorted(byte for start, size in blocks for byte in range(start, start + size, 4))

    pieces = [
        piece.data
        for piece in shard_optimizer_state(step.optimizer, make_sharded_state_dict(step.chunks))[
            "pieces"
        ]
    ]
    own = [
        tensor for state in list_states(step) for kind, tensor in state.items() if kind != "step"
    ]
    assert addresses(pieces) == addresses(own)


def check_equal(step: TrainStep, expected_step: TrainStep) -> None:
    """Check that both have the same weights, moments and step counts."""
    for ours, expected in zip(list_states(step), list_states(expected_step), strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[kind], expected[kind]) for kind in ours)


def list_states(step: TrainStep) -> list[dict[str, torch.Tensor]]:
    """Return the fp32 weights and optimizer state of this rank, by parameter."""
    (distributed_optimizer,) = step.optimizer.chained_optimizers
    return [
        {"param": parameter.detach(), **distributed_optimizer.optimizer.state[parameter]}
        for group in distributed_optimizer.optimizer.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_equal_what_megatron_gathers_and_each_loads_the_other(
    tmp_path: Path, layout: str
) -> None:
    make_tiny_store(tmp_path / "store")
    recipe = tiny_recipe(tmp_path, **LAYOUTS[layout])
    run_distributed(exchange, recipe.parallel.num_workers, recipe, tmp_path / "checkpoints")


def test_boxes_of_several_buckets_are_at_the_position_of_the_weights(tmp_path: Path) -> None:
    """In fp32 the model's and the optimizer's weights are equal, and both are saved.

    Megatron-Core's own gathering ignores the padding between buckets, so it is no reference here.
    """
    make_tiny_store(tmp_path / "store")
    # Megatron-Core's default bucket is larger than the tiny model.
    recipe = tiny_recipe(tmp_path, parallel={"num_workers": 2, "bucket_size": 5000})
    folder = tmp_path / "checkpoint"
    buckets = run_distributed(save_from_small_buckets, 2, recipe, folder)
    assert buckets[0] > 1
    stored = MegatronCheckpointReader(folder)
    rows = stored.num_rows("embedding.word_embeddings.weight")
    for key, place, _ in iter_tensors(recipe.model, rows):
        weights = stored.read_tensor(key, place)
        assert torch.equal(stored.read_tensor(f"optimizer.state.param.{key}", place), weights), key
