"""Optimizer state in boxes: what Megatron-Core writes and reads by gathering everything, without gathering anything."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
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
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
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
STEPS = 2


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """The shape of a tensor, and where a run of its numbers begins and ends."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    size = math.prod(shape)
    start = draw(st.integers(0, size - 1))
    return shape, start, draw(st.integers(start + 1, size))


@given(runs())
def test_boxes_are_the_numbers_of_a_run_in_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = [
        whole[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))].ravel()
        for offset, size in split_into_boxes(shape, start, stop)
    ]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def save_from_small_buckets(recipe: Recipe, folder: Path) -> int:
    """Save and load, where gradients are added up in several parts, as those of large models are.

    Returns:
        How many parts.
    """
    from torch import distributed

    from ul2r.data.sampling.batches import Batches
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.checkpoint.sharded_state import load_checkpoint, start_save
    from ul2r.train.mesh import Mesh

    module: Any = import_module("ul2r.train.step")
    settings = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = partial(settings, bucket_size=5000)
    mesh, dataset = Mesh.join(recipe.parallel), open_dataset(recipe.storage_paths.store)
    step, other = (module.TrainStep(recipe, mesh, dataset.vocabulary.size) for _ in range(2))
    step.train(0, Batches(recipe, dataset).rows(0, mesh.data_rank, recipe.parallel.data))
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
    """Train, save by boxes and by Megatron-Core's own way, and let each be read the other way, on every rank."""
    from megatron.core import dist_checkpointing, parallel_state
    from torch import distributed

    from ul2r.data.sampling.batches import Batches
    from ul2r.data.store.dataset import open_dataset
    from ul2r.model.build import make_sharded_state_dict, make_sharding_metadata
    from ul2r.train.checkpoint.async_write import AsyncWrite
    from ul2r.train.checkpoint.sharded_state import load_checkpoint, start_save
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    def theirs(step: TrainStep, *, loading: bool) -> dict[str, Any]:
        model = make_sharded_state_dict(step.chunks)
        metadata = {**make_sharding_metadata(), "distrib_optim_sharding_type": "fully_reshardable"}
        state = step.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": state}

    mesh, dataset = Mesh.join(recipe.parallel), open_dataset(recipe.storage_paths.store)
    step, other = (TrainStep(recipe, mesh, dataset.vocabulary.size) for _ in range(2))
    batches = Batches(recipe, dataset)
    for number in range(STEPS):
        step.train(number, batches.rows(number, mesh.data_rank, recipe.parallel.data))
    check_pieces(step)
    gathered = theirs(step, loading=False)
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
    for write in reversed(writes):  # each knows its own results, whichever was done first
        write.finalize()
    distributed.barrier()

    loaded = dist_checkpointing.load(theirs(other, loading=True), str(folder / "boxes"))
    for (number, kind), expected in whole.items():
        assert torch.equal(loaded["optimizer"]["param_state"][number][kind], expected), kind

    load_checkpoint(folder / "megatron", other, optimizer=True)
    check_equal(other, step)
    assert {float(state["step"]) for state in states(other)} == {STEPS}
    other.train(STEPS, batches.rows(STEPS, mesh.data_rank, recipe.parallel.data))
    assert {float(state["step"]) for state in states(other)} == {STEPS + 1}


def check_pieces(step: TrainStep) -> None:
    """They are the optimizer's own numbers, each once, where they lie."""
    from ul2r.model.build import make_sharded_state_dict
    from ul2r.train.checkpoint.optimizer_state import shard_optimizer_state

    def numbers(tensors: list[torch.Tensor]) -> list[int]:
        each = ((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        return sorted(byte for place, size in each for byte in range(place, place + size, 4))

    pieces = [
        piece.data
        for piece in shard_optimizer_state(step.optimizer, make_sharded_state_dict(step.chunks))[
            "pieces"
        ]
    ]
    own = [tensor for state in states(step) for kind, tensor in state.items() if kind != "step"]
    assert numbers(pieces) == numbers(own)


def check_equal(one: TrainStep, other: TrainStep) -> None:
    """Both are to take the same next step."""
    for ours, expected in zip(states(one), states(other), strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[kind], expected[kind]) for kind in ours)


def states(step: TrainStep) -> list[dict[str, torch.Tensor]]:
    """What this rank updates and remembers, parameter by parameter."""
    (part,) = step.optimizer.chained_optimizers
    return [
        {"param": parameter.detach(), **part.optimizer.state[parameter]}
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_are_what_megatron_gathers_and_either_way_reads_the_other(
    tmp_path: Path, layout: str
) -> None:
    tiny_store(tmp_path / "store")
    recipe = tiny_recipe(tmp_path, **LAYOUTS[layout])
    run_distributed(exchange, recipe.parallel.num_workers, recipe, tmp_path / "checkpoints")


def test_boxes_of_several_buckets_are_where_the_weights_are(tmp_path: Path) -> None:
    """In fp32 weights are saved twice. (Megatron-Core's own gathering overlooks the padding between buckets.)"""
    tiny_store(tmp_path / "store")
    recipe, folder = tiny_recipe(tmp_path, parallel={"num_workers": 2}), tmp_path / "checkpoint"
    buckets = run_distributed(save_from_small_buckets, 2, recipe, folder)
    assert buckets[0] > 1
    stored = MegatronCheckpointReader(folder)
    rows = stored.num_rows("embedding.word_embeddings.weight")
    for key, place, _ in iter_tensors(recipe.model, rows):
        weights = stored.read_tensor(key, place)
        assert torch.equal(stored.read_tensor(f"optimizer.state.param.{key}", place), weights), key
