"""Logits at targets only: a step's losses and gradients are those of logits at all positions, in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ul2r.config import Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

pytestmark = pytest.mark.distributed

TENSOR_2 = {"num_workers": 2, "tensor": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": TENSOR_2},
    "tensor, sequence, z-loss": {
        "parallel": TENSOR_2 | {"sequence_parallel": True},
        "optimizer": {"z_loss": 0.1},
    },
    "pipeline, Gemma 3": {"parallel": {"num_workers": 2, "pipeline": 2}, "model": GEMMA_3},
}


@dataclass(frozen=True)
class Outputs:
    """A step's losses and gradients, and the positions at which this rank computed logits."""

    loss: float
    gradients: dict[str, torch.Tensor]
    num_positions: int


def measure(recipes: dict[str, Recipe]) -> dict[str, dict[bool, Outputs]]:
    """Measure everything in one pair of processes: starting them takes longer than any of it."""
    return {name: compare_outputs(recipe) for name, recipe in recipes.items()}


def compare_outputs(recipe: Recipe) -> dict[bool, Outputs]:
    """Compute a step with logits where the loss counts, and one with logits everywhere."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train import transfer
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    batch = BatchBuilder(recipe, dataset).build(0, mesh.data_rank, recipe.parallel.data)
    outputs = {}
    for is_cut in (True, False):
        step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        (chunk,) = step.chunks
        sizes: list[int] = []
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(
                lambda _, __, output, sizes=sizes: sizes.append(output[0].shape[:2].numel())
            )
        with pytest.MonkeyPatch.context() as patch:
            if not is_cut:
                patch.setattr(transfer, "locate_outputs", lambda _: None)
            result = step.forward_backward(0, batch)
        gradients = {
            name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()
        }
        outputs[is_cut] = Outputs(result.losses.mean, gradients, sum(sizes))
    mesh.leave()
    return outputs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[bool, Outputs]]]:
    storage = tmp_path_factory.mktemp("outputs")
    make_tiny_store(storage / "store")
    recipes = {name: tiny_recipe(storage, **changes) for name, changes in LAYOUTS.items()}
    return run_distributed(measure, 2, recipes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_where_the_loss_counts_give_the_losses_and_gradients_of_all_logits(
    results: list[dict[str, dict[bool, Outputs]]], layout: str
) -> None:
    for rank, of_rank in enumerate(results):
        cut, whole = (of_rank[layout][is_cut] for is_cut in (True, False))
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        assert cut.gradients.keys() == whole.gradients.keys()
        for name, gradient in cut.gradients.items():
            largest = whole.gradients[name].abs().max()
            assert largest > 0
            difference = (gradient - whole.gradients[name]).abs().max()
            assert difference <= 1e-5 * largest, name
        # 8 rows of 64 positions; the first stage of a pipeline has no logits.
        has_logits = rank == 1 or "pipeline" not in layout
        assert whole.num_positions == (8 * 64 if has_logits else 0)
        assert cut.num_positions < 0.7 * whole.num_positions or not has_logits
