"""Models with experts: the balancing loss is its formula's, and every layout trains the same model."""

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

EXPERTS, PICKED = 4, 2
MODEL = {"family": "mixtral", "num_experts": EXPERTS, "num_experts_per_token": PICKED}
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


def recipe_of(storage: Path, name: str, balance: float = 1.0, **changes: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    """Balanced so strongly that it shows in the losses, unless told otherwise."""
    optimizer = {"moe_aux_loss_coeff": balance, "learning_rate": 3e-3}
    name = name.replace(" ", "-").replace(",", "")
    return tiny_recipe(storage, name=name, model=MODEL, optimizer=optimizer, **changes)


def steps(*recipes: Recipe) -> list[Steps]:
    """Losses and gradient norms of each run."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    found = []
    for recipe in recipes:
        tracker = MemoryTracker()
        run_worker(recipe, tracker)
        losses, norms = (
            [value for _, value in tracker.series(f"train/{name}")]
            for name in ("loss", "grad_norm")
        )
        found.append((losses, norms))
    return found


def router_gradients(*recipes: Recipe) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each recipe's gradient of its last layer's router; what that router read, by microbatch; and its weight."""
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
        read: list[Tensor] = []
        router.register_forward_hook(
            lambda _, given, __, read=read: read.append(given[0].detach().flatten(0, 1))
        )
        step.forward_backward(0, BatchBuilder(recipe, dataset).build(0, 0, 1))
        gradients.append(router.weight.main_grad.clone())
        weight = router.weight.detach().clone()
    mesh.leave()
    return gradients, read, weight


def balancing_loss(read: Tensor, weight: Tensor) -> Tensor:
    """E sum_i f_i P_i of tokens (N, H), as the Switch Transformer's paper writes it, expert by expert."""
    probabilities = functional.softmax(read @ weight.T, dim=-1)
    picked = probabilities.topk(PICKED, dim=-1).indices
    total = torch.zeros(())
    for expert in range(EXPERTS):
        share = float((picked == expert).sum()) / picked.numel()
        total = total + share * probabilities[:, expert].mean()
    return EXPERTS * total


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def single(storage: Path) -> Steps:
    balanced, free = recipe_of(storage, "single"), recipe_of(storage, "free", balance=0)
    found: Steps
    ((found, without),) = run_distributed(steps, 1, balanced, free)
    assert np.abs(np.subtract(found[1], without[1])).max() > 0.01  # or the tests below show nothing
    return found


def test_balancing_gradient_is_that_of_the_papers_formula(storage: Path) -> None:
    """Of the last router, whose balancing loss nothing else depends on: the mean over microbatches."""
    recipes = [recipe_of(storage, f"balance {weight}", weight) for weight in (0.0, 0.5)]
    ((gradients, read, weight),) = run_distributed(router_gradients, 1, *recipes)
    assert len(read) == 4
    weight.requires_grad_()
    mean = torch.stack([balancing_loss(one, weight) for one in read]).mean()
    (expected,) = torch.autograd.grad(0.5 * mean, weight)
    without, balanced = gradients
    torch.testing.assert_close(balanced - without, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_steps_and_goes_on_from_a_checkpoint(
    storage: Path, single: Steps, layout: str
) -> None:
    new = recipe_of(storage, layout, **LAYOUTS[layout])
    continued = recipe_of(storage, f"{layout} continued", **LAYOUTS[layout])
    folder = continued.paths.checkpoints
    folder.mkdir(parents=True)
    of_single = recipe_of(storage, "single").paths.checkpoints
    (folder / "step_00000003").symlink_to(of_single / "step_00000003")
    (folder / "latest").write_text("step_00000003")
    found, later = run_distributed(steps, new.parallel.num_workers, new, continued)[0]
    for (losses, norms), first in ((found, 0), (later, 3)):
        np.testing.assert_allclose(losses, single[0][first:], rtol=1e-4)
        np.testing.assert_allclose(norms, single[1][first:], rtol=1e-3)
