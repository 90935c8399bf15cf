"""Models with experts: the balancing loss equals its formula, and every layout trains the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ul2r.config import Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.distributed

NUM_EXPERTS = 4
NUM_CHOSEN = 2
MODEL = {"family": "mixtral", "num_experts": NUM_EXPERTS, "num_experts_per_token": NUM_CHOSEN}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {"parallel": {"num_workers": 2}},
    "PP 2, full recomputation": {
        "parallel": {"num_workers": 2, "pipeline": 2},
        "training": {"recompute": "full"},
    },
    "TP 2 x SP": {"parallel": {"num_workers": 2, "tensor": 2, "sequence_parallel": True}},
    "TP 2 x PP 2 x SP": {
        "parallel": {"num_workers": 4, "tensor": 2, "pipeline": 2, "sequence_parallel": True}
    },
}
Steps = tuple[list[float], list[float]]
"""Losses and gradient norms of a run."""


def make_recipe(
    storage: Path,
    name: str,
    aux_loss_coeff: float = 1.0,
    **changes: Any,  # noqa: ANN401  sections of a recipe
) -> Recipe:
    """Make a recipe whose balancing loss is, by default, so strong that the other losses show it."""
    optimizer = {"moe_aux_loss_coeff": aux_loss_coeff, "learning_rate": 3e-3}
    name = name.replace(" ", "-").replace(",", "")
    return tiny_recipe(storage, name=name, model=MODEL, optimizer=optimizer, **changes)


def train(*recipes: Recipe) -> list[Steps]:
    """Train each recipe and return its losses and gradient norms."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    results = []
    for recipe in recipes:
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        losses, norms = (
            [value for _, value in tracker.series(f"train/{name}")]
            for name in ("loss", "grad_norm")
        )
        results.append((losses, norms))
    return results


def compute_router_gradients(*recipes: Recipe) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return each recipe's gradient of the last layer's router, the router's inputs by microbatch, and its weight."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    mesh = Mesh.join(recipes[0].parallel)
    gradients = []
    for recipe in recipes:
        dataset = open_dataset(recipe.storage_paths.store)
        step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        router = step.chunks[0].decoder.layers[-1].mlp.router
        inputs: list[Tensor] = []
        router.register_forward_hook(
            lambda _, given, __, inputs=inputs: inputs.append(given[0].detach().flatten(0, 1))
        )
        step.forward_backward(0, BatchBuilder(recipe, dataset).build(0, 0, 1))
        gradients.append(router.weight.main_grad.clone())
        weight = router.weight.detach().clone()
    mesh.leave()
    return gradients, inputs, weight


def compute_balancing_loss(tokens: Tensor, weight: Tensor) -> Tensor:
    """Compute E sum_i f_i P_i of tokens (N, H), expert by expert (Switch Transformer, arXiv 2101.03961, 2.2)."""
    probabilities = functional.softmax(tokens @ weight.T, dim=-1)
    chosen = probabilities.topk(NUM_CHOSEN, dim=-1).indices
    total = torch.zeros(())
    for expert in range(NUM_EXPERTS):
        fraction = float((chosen == expert).sum()) / chosen.numel()
        total = total + fraction * probabilities[:, expert].mean()
    return NUM_EXPERTS * total


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def single(storage: Path) -> Steps:
    balanced = make_recipe(storage, "single")
    unbalanced = make_recipe(storage, "unbalanced", aux_loss_coeff=0)
    with_loss: Steps
    ((with_loss, without_loss),) = run_distributed(train, 1, balanced, unbalanced)
    # Otherwise the tests below would pass with any balancing loss.
    assert np.abs(np.subtract(with_loss[1], without_loss[1])).max() > 0.01
    return with_loss


def test_balancing_gradient_equals_that_of_the_papers_formula(storage: Path) -> None:
    """For the last router, on whose balancing loss nothing else depends: the mean over microbatches."""
    recipes = [make_recipe(storage, f"balance {weight}", weight) for weight in (0.0, 0.5)]
    ((gradients, inputs, weight),) = run_distributed(compute_router_gradients, 1, *recipes)
    assert len(inputs) == 4
    weight.requires_grad_()
    mean = torch.stack([compute_balancing_loss(tokens, weight) for tokens in inputs]).mean()
    (expected,) = torch.autograd.grad(0.5 * mean, weight)
    without, balanced = gradients
    torch.testing.assert_close(balanced - without, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_steps_and_resumes_from_a_checkpoint(
    storage: Path, single: Steps, layout: str
) -> None:
    new = make_recipe(storage, layout, **LAYOUTS[layout])
    resumed = make_recipe(storage, f"{layout} resumed", **LAYOUTS[layout])
    folder = resumed.paths.checkpoints
    folder.mkdir(parents=True)
    single_checkpoints = make_recipe(storage, "single").paths.checkpoints
    (folder / "step_00000003").symlink_to(single_checkpoints / "step_00000003")
    (folder / "latest").write_text("step_00000003")

    from_start, from_step_3 = run_distributed(train, new.parallel.num_workers, new, resumed)[0]
    for (losses, norms), first in ((from_start, 0), (from_step_3, 3)):
        np.testing.assert_allclose(losses, single[0][first:], rtol=1e-4)
        np.testing.assert_allclose(norms, single[1][first:], rtol=1e-3)
