"""Estimated sizes equal what Megatron-Core builds and keeps, in every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.model.sizing import MemoryEstimate, estimate_run
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

pytestmark = pytest.mark.distributed

SP = {"num_workers": 2, "tensor": 2, "sequence_parallel": True}
VP = {"num_workers": 2, "pipeline": 2, "virtual_stages": 2}
ENDS = {
    "num_workers": 3,
    "pipeline": 3,
    "virtual_stages": 2,
    "account_for_embedding_and_loss": True,
}
EXPERTS = {"family": "mixtral", "num_experts": 4, "num_experts_per_token": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "TP 2": {"parallel": {"num_workers": 2, "tensor": 2}},
    "TP 2 of one key/value head": {
        "parallel": {"num_workers": 2, "tensor": 2},
        "model": {"num_kv_heads": 1},
    },
    "PP 2": {"parallel": {"num_workers": 2, "pipeline": 2}},
    "DP 2": {"parallel": {"num_workers": 2}},
    "TP 2 x PP 2": {"parallel": {"num_workers": 4, "tensor": 2, "pipeline": 2}},
    "TP 2 x SP": {"parallel": SP},
    "TP 2 x SP, selective": {"parallel": SP, "training": {"recompute": "selective"}},
    "TP 2 x SP, full": {"parallel": SP, "training": {"recompute": "full"}},
    "PP 2 x VP 2": {"parallel": VP},
    "PP 2 x VP 2, selective": {"parallel": VP, "training": {"recompute": "selective"}},
    "PP 2 x VP 2, full": {"parallel": VP, "training": {"recompute": "full"}},
    "experts": {"model": EXPERTS},
    "experts, TP 2 x SP": {"model": EXPERTS, "parallel": SP},
    "experts, TP 2 x SP, selective": {
        "model": EXPERTS,
        "parallel": SP,
        "training": {"recompute": "selective"},
    },
    "experts, PP 2, full": {
        "model": EXPERTS,
        "parallel": {"num_workers": 2, "pipeline": 2},
        "training": {"recompute": "full"},
    },
    "PP 3 x VP 2 x ends": {"parallel": ENDS},
    "PP 3 x VP 2 x ends, full": {"parallel": ENDS, "training": {"recompute": "full"}},
    "no gate": {"model": {"activation": "gelu"}},
    "TP 2, norms of heads": {
        "parallel": {"num_workers": 2, "tensor": 2},
        "model": {"qk_norm": "head"},
    },
    "TP 2, norms of all heads": {
        "parallel": {"num_workers": 2, "tensor": 2},
        "model": {"qk_norm": "full"},
    },
    "Gemma 3": {"model": GEMMA_3},
    "Gemma 3, TP 2": {"model": GEMMA_3, "parallel": {"num_workers": 2, "tensor": 2}},
    "Gemma 3, TP 2 x SP, selective": {
        "model": GEMMA_3,
        "parallel": SP,
        "training": {"recompute": "selective"},
    },
    "Gemma 3, TP 2 x SP, full": {
        "model": GEMMA_3,
        "parallel": SP,
        "training": {"recompute": "full"},
    },
    "Gemma 3, PP 2 x VP 2, full": {
        "model": GEMMA_3,
        "parallel": VP,
        "training": {"recompute": "full"},
    },
}


@dataclass(frozen=True)
class RankSizes:
    """Sizes measured on one rank.

    Attributes:
        num_parameters: Elements of its parameters.
        num_tensors: Parameter tensors, each of which Megatron pads in its buffers.
        weights: Bytes of the parameter buffers.
        gradients: Bytes of the gradient buffers.
        optimizer: Bytes of its optimizer state.
        saved: Most bytes that autograd kept at the same time.
    """

    num_parameters: int
    num_tensors: int
    weights: int
    gradients: int
    optimizer: int
    saved: int


def storage_address(tensor: Any) -> int:  # noqa: ANN401  a tensor; only the workers import torch
    address: int = tensor.untyped_storage().data_ptr()
    return address


class SavedBytes:
    """Sum of the storages that autograd holds, each counted once, and its peak."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.num_holders = dict[int, int]()
        self.current = 0
        self.peak = 0

    def pack(self, tensor: Any) -> SavedTensor:  # noqa: ANN401  as above
        return SavedTensor(self, tensor)


class SavedTensor:
    """Tensor saved for the backward pass; autograd frees it by dropping this object."""

    def __init__(self, total: SavedBytes, tensor: Any) -> None:  # noqa: ANN401  as above
        self.total = total
        self.tensor = tensor
        self.address = storage_address(tensor)
        self.nbytes = tensor.untyped_storage().nbytes()

        num_holders = total.num_holders.get(self.address, 0)
        total.num_holders[self.address] = num_holders + 1
        if not num_holders and self.address not in total.ignored:
            total.current += self.nbytes
            total.peak = max(total.peak, total.current)

    def __del__(self) -> None:
        self.total.num_holders[self.address] -= 1
        if not self.total.num_holders[self.address] and self.address not in self.total.ignored:
            self.total.current -= self.nbytes


def measure_all(*recipes: Recipe) -> list[tuple[int, RankSizes]]:
    return [measure(recipe) for recipe in recipes]


def measure(recipe: Recipe) -> tuple[int, RankSizes]:
    """Take a step and return this rank's pipeline stage and its sizes."""
    import torch
    from megatron.core import parallel_state

    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    buffers = [buffer for chunk in step.model for buffer in chunk.buffers]
    weights = {storage_address(buffer.param_data) for buffer in buffers}
    saved = SavedBytes(ignored=weights)
    batch = BatchBuilder(recipe, dataset).build(0, mesh.data_rank, recipe.parallel.data)
    # Logits are computed at targets only. Planned is the microbatch that needs the most: all of it targets.
    batch = replace(batch, loss_mask=np.ones_like(batch.loss_mask))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        take_step(step, 0, batch)

    states = [
        (parameter, state["exp_avg"], state["exp_avg_sq"])
        for part in step.optimizer.chained_optimizers
        for parameter, state in part.optimizer.state.items()
    ]
    # In fp32 the optimizer's main weights are the model's own: they are not counted twice.
    own = [tensor for state in states for tensor in state if storage_address(tensor) not in weights]
    parameters = [parameter for chunk in step.chunks for parameter in chunk.parameters()]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mesh.leave()
    return stage, RankSizes(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_tensors=len(parameters),
        weights=sum(buffer.param_data.nbytes for buffer in buffers),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(tensor.nbytes for tensor in own),
        saved=saved.peak,
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizing")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def measured(storage: Path) -> dict[str, list[tuple[int, RankSizes]]]:
    """Sizes of every rank by layout; layouts with the same number of workers share processes."""
    recipes = {layout: tiny_recipe(storage, **changes) for layout, changes in LAYOUTS.items()}
    results: dict[str, list[tuple[int, RankSizes]]] = {}
    for num_workers in {recipe.parallel.num_workers for recipe in recipes.values()}:
        group = {
            layout: recipe
            for layout, recipe in recipes.items()
            if recipe.parallel.num_workers == num_workers
        }
        ranks = run_distributed(measure_all, num_workers, *group.values())
        results |= dict(zip(group, map(list, zip(*ranks, strict=True)), strict=True))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_estimate_equals_what_is_built(
    storage: Path, measured: dict[str, list[tuple[int, RankSizes]]], layout: str
) -> None:
    from ul2r.data.store.dataset import open_dataset

    recipe = tiny_recipe(storage, **LAYOUTS[layout])
    parallel = recipe.parallel
    vocabulary = open_dataset(recipe.storage_paths.store).vocabulary
    stages = estimate_run(recipe, vocabulary.size).stages
    assert len(measured[layout]) == parallel.num_workers

    for number, rank in measured[layout]:
        stage = stages[number]
        assert stage.num_parameters == rank.num_parameters
        check_state(stage.memory, rank, parallel.data)

        # Megatron's schedule also keeps the outputs that a stage sends on, outside of autograd.
        num_passes = stage.num_live_microbatches * parallel.virtual_stages
        num_sent = num_passes - (number == parallel.pipeline - 1)
        positions = recipe.training.micro_batch_size * recipe.objective.sequence_length
        sent = 4 * positions * recipe.model.hidden_size * num_sent
        estimated = stage.memory.activations + stage.memory.logits
        assert estimated == pytest.approx(rank.saved + sent, rel=0.01)


def check_state(estimated: MemoryEstimate, rank: RankSizes, data: int) -> None:
    """Megatron aligns each parameter to 64 elements and pads a buffer to a multiple of lcm(data, 128)."""
    padding = 4 * (63 * rank.num_tensors + math.lcm(data, 128))
    assert estimated.weights <= rank.weights <= estimated.weights + padding
    assert estimated.gradients <= rank.gradients <= estimated.gradients + padding
    # Shards of the two moments are equal except for what the padding displaces.
    assert abs(rank.optimizer - estimated.optimizer) <= 2 * padding
