"""Logits at targets only, and a learning rate of their own for rows of modes and sentinels, in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class RankResult:
    """Measurements of one rank, by layout."""

    outputs: dict[str, dict[bool, Outputs]]
    """Of a step with logits where the loss counts, and with logits everywhere."""
    updates: dict[str, dict[float, list[torch.Tensor]]]
    """Of this rank's rows of embedding and output matrix in a step, by factor of the rate."""


def measure(layouts: dict[str, Recipe], rates: dict[str, dict[float, Recipe]]) -> RankResult:
    """Measure everything in one pair of processes: starting them takes longer than any of it."""
    return RankResult(
        outputs={name: compare_outputs(recipe) for name, recipe in layouts.items()},
        updates={
            name: {factor: find_updates(recipe) for factor, recipe in recipes.items()}
            for name, recipes in rates.items()
        },
    )


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


def find_updates(recipe: Recipe) -> list[torch.Tensor]:
    """Return what a step adds to embedding and output matrix."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep.for_vocabulary(recipe, mesh, dataset.vocabulary)
    batch = BatchBuilder(recipe, dataset).build(0, mesh.data_rank, recipe.parallel.data)
    (chunk,) = step.chunks
    matrices = [chunk.embedding.word_embeddings.weight, chunk.output_layer.weight]
    before = [matrix.detach().clone() for matrix in matrices]
    step.forward_backward(0, batch)
    step.optimizer_step()
    mesh.leave()
    return [matrix.detach() - old for matrix, old in zip(matrices, before, strict=True)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def results(storage: Path) -> list[RankResult]:
    def with_rate(parallel: dict[str, int], factor: float) -> Recipe:
        return tiny_recipe(
            storage,
            parallel=parallel,
            model={"tie_embeddings": False},
            optimizer={"special_token_lr_factor": factor, "decay_embeddings": True},
        )

    return run_distributed(
        measure,
        2,
        {name: tiny_recipe(storage, **changes) for name, changes in LAYOUTS.items()},
        {
            name: {factor: with_rate(parallel, factor) for factor in (1.0, 4.0)}
            for name, parallel in (("tensor", TENSOR_2), ("data", {"num_workers": 2}))
        },
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_where_the_loss_counts_give_the_losses_and_gradients_of_all_logits(
    results: list[RankResult], layout: str
) -> None:
    for rank, of_rank in enumerate(results):
        cut, whole = (of_rank.outputs[layout][is_cut] for is_cut in (True, False))
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


@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_only_rows_of_modes_and_sentinels_learn_at_their_own_rate(
    storage: Path, results: list[RankResult], layout: str
) -> None:
    from ul2r.data.store.dataset import open_dataset

    special = sorted(open_dataset(storage / "store").vocabulary.non_text_ids)
    assert len(special) == 64 + 3
    updates = {}
    for factor in (1.0, 4.0):
        # Tensor ranks have a half of the rows each, replicas all of them.
        of_ranks = [result.updates[layout][factor] for result in results]
        updates[factor] = [
            torch.cat(parts) if layout == "tensor" else parts[0]
            for parts in zip(*of_ranks, strict=True)
        ]
    for plain, scaled in zip(updates[1.0], updates[4.0], strict=True):
        expected = plain.clone()
        expected[special] *= 4
        assert plain[special].abs().max() > 0
        # A difference of weights of 0.02, rounded to fp32.
        torch.testing.assert_close(scaled, expected, atol=2e-8, rtol=1e-5)
