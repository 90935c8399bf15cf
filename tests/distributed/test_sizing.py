"""Sizes told beforehand are those of what Megatron-Core then builds and keeps, in every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.model.sizing import MemoryEstimate, estimate_run
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
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
    "num_experts": {"model": EXPERTS},
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
class Measured:
    """What one rank really has."""

    num_parameters: int
    tensors: int
    """Parameter tensors, each of which Megatron pads in its buffers."""
    weights: int
    gradients: int
    optimizer: int
    kept: int
    """Bytes that autograd keeps at the same time, at the most."""


def _storage(tensor: Any) -> int:  # noqa: ANN401  a tensor; torch is only imported in the processes
    place: int = tensor.untyped_storage().data_ptr()
    return place


class Kept:
    """Adds up the storages that autograd holds, each once, and remembers the most there were."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored, self.holders = ignored, dict[int, int]()
        self.now = self.most = 0

    def pack(self, tensor: Any) -> Held:  # noqa: ANN401  as above
        return Held(self, tensor)


class Held:
    """A tensor in autograd's hands."""

    def __init__(self, kept: Kept, tensor: Any) -> None:  # noqa: ANN401  as above
        self.kept, self.tensor = kept, tensor
        self.place, self.size = _storage(tensor), tensor.untyped_storage().nbytes()
        holders = kept.holders.get(self.place, 0)
        kept.holders[self.place] = holders + 1
        if not holders and self.place not in kept.ignored:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.holders[self.place] -= 1
        if not self.kept.holders[self.place] and self.place not in self.kept.ignored:
            self.kept.now -= self.size


def measure_all(*recipes: Recipe) -> list[tuple[int, Measured]]:
    return [measure(recipe) for recipe in recipes]


def measure(recipe: Recipe) -> tuple[int, Measured]:
    """Take a step; the pipeline stage of this rank and what it has."""
    import torch
    from megatron.core import parallel_state

    from ul2r.data.sampling.batches import Batches
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    buffers = [buffer for chunk in step.model for buffer in chunk.buffers]
    weights = {_storage(buffer.param_data) for buffer in buffers}
    kept = Kept(weights)
    rows = Batches(recipe, dataset).rows(0, mesh.data_rank, recipe.parallel.data)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        step.train(0, rows)
    states = [
        (parameter, state["exp_avg"], state["exp_avg_sq"])
        for part in step.optimizer.chained_optimizers
        for parameter, state in part.optimizer.state.items()
    ]
    own = [one for state in states for one in state if _storage(one) not in weights]
    parameters = [parameter for chunk in step.chunks for parameter in chunk.parameters()]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mesh.leave()
    return stage, Measured(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        tensors=len(parameters),
        weights=sum(buffer.param_data.nbytes for buffer in buffers),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(tensor.nbytes for tensor in own),
        kept=kept.most,
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizing")
    tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def measured(storage: Path) -> dict[str, list[tuple[int, Measured]]]:
    """What every rank of each layout has; layouts of as many workers share their processes."""
    recipes = {layout: tiny_recipe(storage, **changes) for layout, changes in LAYOUTS.items()}
    results: dict[str, list[tuple[int, Measured]]] = {}
    for workers in {recipe.parallel.num_workers for recipe in recipes.values()}:
        here = {name: one for name, one in recipes.items() if one.parallel.num_workers == workers}
        ranks = run_distributed(measure_all, workers, *here.values())
        results |= dict(zip(here, map(list, zip(*ranks, strict=True)), strict=True))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_those_of_what_is_built(
    storage: Path, measured: dict[str, list[tuple[int, Measured]]], layout: str
) -> None:
    from ul2r.data.store.dataset import open_dataset

    recipe = tiny_recipe(storage, **LAYOUTS[layout])
    parallel = recipe.parallel
    stages = estimate_run(recipe, open_dataset(recipe.storage_paths.store).vocabulary.size).stages
    assert len(measured[layout]) == parallel.num_workers
    for number, rank in measured[layout]:
        stage = stages[number]
        assert stage.num_parameters == rank.num_parameters
        check_state(stage.memory, rank, parallel.data)
        # A stage holds what it sends on as well, in Megatron's schedule and not in autograd.
        sends = stage.microbatches * parallel.virtual_stages - (number == parallel.pipeline - 1)
        positions = recipe.training.micro_batch_size * recipe.objective.sequence_length
        sent = 4 * positions * recipe.model.hidden_size * sends
        told = stage.memory.activations + stage.memory.logits
        assert told == pytest.approx(rank.kept + sent, rel=0.01)


def check_state(told: MemoryEstimate, rank: Measured, data: int) -> None:
    """Megatron begins each parameter at a multiple of 64 elements and pads the whole to one of lcm(data, 128)."""
    padding = 4 * (63 * rank.tensors + math.lcm(data, 128))
    assert told.weights <= rank.weights <= told.weights + padding
    assert told.gradients <= rank.gradients <= told.gradients + padding
    # The shards of the two moments are equal but for what the padding displaces.
    assert abs(rank.optimizer - told.optimizer) <= 2 * padding
