"""Weight decay, z-loss over a split vocabulary, optimizer state loaded from a base, and recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ul2r.config import Parallel, Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

TENSOR_2 = {"num_workers": 2, "tensor": 2}
PIPELINE_2 = {"num_workers": 2, "pipeline": 2}
Z_WEIGHT = 0.1
NUM_CLIPPED = 3


@dataclass(frozen=True)
class RankResult:
    """Measurements of one rank."""

    z_loss: ZLoss
    decayed: dict[bool, set[str]]
    """Parameters that weight decay changed, by `optimizer.decay_embeddings`."""
    states: dict[str, OptimizerState]
    """Of "base", and of runs that start from it with ("loaded") or without ("fresh") its optimizer state."""
    runs: dict[str, list[tuple[float, float]]]
    """Loss and gradient norm of each step: by `training.recompute`, and with z-loss by layout."""
    clipping: Clipping


@dataclass(frozen=True)
class ZLoss:
    """Losses and gradients of this rank's half of the vocabulary."""

    losses: torch.Tensor
    log_z: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Clipping:
    """Steps whose gradients are clipped."""

    num_norms: int
    """Gradient norms that were computed in them."""
    differing: set[str]
    """Parameters that are others than after Megatron-Core's own steps."""


@dataclass(frozen=True)
class OptimizerState:
    """Moments and settings of an optimizer."""

    moments: torch.Tensor
    steps: set[float]
    rates: set[tuple[float, float]]
    betas: set[tuple[float, float]]


def measure(
    decays: dict[bool, tuple[Recipe, Recipe]],
    starts: dict[str, Recipe],
    runs: dict[str, Recipe],
    clipped: Recipe,
) -> RankResult:
    """Measure everything in one pair of processes: starting them takes longer than any of it."""
    return RankResult(
        z_loss=compute_z_loss(),
        decayed={embeddings: find_decayed(*pair) for embeddings, pair in decays.items()},
        states={name: read_initial_state(recipe) for name, recipe in starts.items()},
        runs={name: train(recipe) for name, recipe in runs.items()},
        clipping=compare_clipping(clipped),
    )


def make_logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (S, B, V) logits and (B, S) labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 2, 16, generator=generator)
    return logits, torch.randint(0, 16, (2, 8), generator=generator)


def compute_z_loss() -> ZLoss:
    """Compute the loss with z-loss where each tensor rank has half of the logits."""
    from megatron.core import parallel_state

    from ul2r.model.build import build_model
    from ul2r.train.mesh import Mesh

    mesh = Mesh.join(Parallel(**TENSOR_2))
    recipe = tiny_recipe(Path("none"), parallel=TENSOR_2, optimizer={"z_loss": Z_WEIGHT})
    (model,) = build_model(recipe, 128)
    whole, labels = make_logits_and_labels()
    own = whole.chunk(2, dim=-1)[parallel_state.get_tensor_model_parallel_rank()]
    own = own.clone().requires_grad_()

    # Times 1.0: Megatron-Core's cross entropy works in place, which autograd refuses for a leaf.
    losses, log_z = model.compute_language_model_loss(labels, own * 1.0)
    (losses.sum() + Z_WEIGHT * log_z.square().sum()).backward()
    mesh.leave()
    assert own.grad is not None
    return ZLoss(losses.detach(), log_z.detach(), own.grad)


def find_decayed(without: Recipe, with_decay: Recipe) -> set[str]:
    """Return the parameters that differ after a step with weight decay and one without."""
    after = []
    for recipe in (without, with_decay):
        (chunk,) = take_step(recipe).chunks
        after.append({name: value.detach().clone() for name, value in chunk.named_parameters()})
    return {name for name, value in after[0].items() if not torch.equal(value, after[1][name])}


def compare_clipping(recipe: Recipe) -> Clipping:
    """Take `NUM_CLIPPED` steps as a run does, and by Megatron-Core's `optimizer.step`."""
    from megatron.core.optimizer import optimizer as megatron_optimizer

    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    builder = BatchBuilder(recipe, dataset)
    mesh = Mesh.join(recipe.parallel)
    compute_norm = megatron_optimizer.get_grad_norm_fp32
    norms = []

    def count_norm(*arguments: Any, **named: Any) -> float:  # noqa: ANN401  Megatron-Core's own
        norms.append(compute_norm(*arguments, **named))
        return float(norms[-1])

    weights = []
    for is_own in (True, False):
        step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        if is_own:
            megatron_optimizer.get_grad_norm_fp32 = count_norm
        for number in range(NUM_CLIPPED):
            step.forward_backward(
                number, builder.build(number, mesh.data_rank, recipe.parallel.data)
            )
            step.optimizer_step() if is_own else step.optimizer.step()
        megatron_optimizer.get_grad_norm_fp32 = compute_norm
        (chunk,) = step.chunks
        weights.append({name: value.detach().clone() for name, value in chunk.named_parameters()})
    mesh.leave()

    assert all(norm > recipe.optimizer.max_grad_norm for norm in norms), "nothing was clipped"
    differing = {
        name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])
    }
    return Clipping(len(norms), differing)


def take_step(recipe: Recipe) -> Any:  # noqa: ANN401  a TrainStep; its module is imported in the processes only
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    batch = BatchBuilder(recipe, dataset).build(0, mesh.data_rank, recipe.parallel.data)
    step.forward_backward(0, batch)
    step.optimizer_step()
    mesh.leave()
    return step


def read_initial_state(recipe: Recipe) -> OptimizerState:
    """Read the optimizer's state at the start of a run; each of two replicas has half of it."""
    from ul2r.data.store.dataset import open_dataset
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.loop import Trainer
    from ul2r.train.mesh import Mesh

    mesh = Mesh.join(recipe.parallel)
    trainer = Trainer(
        recipe,
        open_dataset(recipe.storage_paths.store),
        mesh,
        MemoryTracker(),
        writer_token="nobody",
    )
    trainer.train_step.schedule.set(0)
    (distributed,) = trainer.train_step.optimizer.chained_optimizers
    states = distributed.optimizer.state.values()
    groups = distributed.optimizer.param_groups
    mesh.leave()

    moments = [state[name].ravel() for state in states for name in ("exp_avg", "exp_avg_sq")]
    return OptimizerState(
        moments=torch.cat(moments),
        steps={float(state["step"]) for state in states},
        rates={(group["lr"], group["weight_decay"]) for group in groups},
        betas={tuple(group["betas"]) for group in groups},
    )


def train(recipe: Recipe) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    tracker = MemoryTracker()
    run_worker(recipe, tracker)
    losses, norms = (tracker.series(f"train/{name}") for name in ("loss", "grad_norm"))
    return [(loss, norm) for (_, loss), (_, norm) in zip(losses, norms, strict=True)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer")
    make_tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def results(storage: Path) -> list[RankResult]:
    quick = {
        "training": {"steps": 2},
        "validation": {"every": 9},
        "evaluation": {"mixture": "causal"},
    }

    def with_decay(weight: float, *, embeddings: bool) -> Recipe:
        settings = {"weight_decay": weight, "decay_embeddings": embeddings}
        return tiny_recipe(storage, parallel=PIPELINE_2, optimizer=settings)

    def on_base(name: str, *, load: bool) -> Recipe:
        settings = {
            "learning_rate": 3e-3,
            "weight_decay": 0.3,
            "beta2": 0.8,
            "load_optimizer_state": load,
        }
        parallel = {"num_workers": 2}
        return tiny_recipe(
            storage, name=name, base="base", parallel=parallel, optimizer=settings, **quick
        )

    def run(name: str, parallel: dict[str, Any], **changes: object) -> Recipe:
        return tiny_recipe(storage, name=name, parallel=parallel, **quick | changes)

    sequence_parallel = TENSOR_2 | {"sequence_parallel": True}

    def recompute(kind: str) -> Recipe:
        return run(kind, sequence_parallel, training={"steps": 2, "recompute": kind})

    base = tiny_recipe(storage, name="base", parallel={"num_workers": 2}, **quick)
    run_distributed(train, 2, base)
    return run_distributed(
        measure,
        2,
        {
            embeddings: (
                with_decay(0, embeddings=embeddings),
                with_decay(0.5, embeddings=embeddings),
            )
            for embeddings in (False, True)
        },
        {
            "base": base,
            "loaded": on_base("loaded", load=True),
            "fresh": on_base("fresh", load=False),
        },
        {
            **{kind: recompute(kind) for kind in ("none", "selective", "full")},
            "z tensor": run("z-tensor", sequence_parallel, optimizer={"z_loss": Z_WEIGHT}),
            "z pipeline": run("z-pipeline", PIPELINE_2, optimizer={"z_loss": Z_WEIGHT}),
        },
        tiny_recipe(
            storage, parallel={"num_workers": 2}, optimizer={"max_grad_norm": 1e-3}, **quick
        ),
    )


def test_z_loss_over_a_split_vocabulary_equals_that_over_the_whole_vocabulary(
    results: list[RankResult],
) -> None:
    logits, labels = make_logits_and_labels()
    logits = logits.double().requires_grad_()
    log_z = logits.logsumexp(-1).T
    losses = log_z - logits.gather(-1, labels.T[..., None])[..., 0].T
    (losses.sum() + Z_WEIGHT * log_z.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    for rank, rank_result in enumerate(results):
        own = rank_result.z_loss
        torch.testing.assert_close(own.losses.double(), losses.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.log_z.double(), log_z.detach(), atol=1e-5, rtol=1e-5)
        gradient = logits.grad.chunk(2, dim=-1)[rank]
        torch.testing.assert_close(own.gradient.double(), gradient, atol=1e-5, rtol=1e-5)


def test_a_step_computes_one_gradient_norm_and_clips_as_megatron_does(
    results: list[RankResult],
) -> None:
    for rank_result in results:
        assert rank_result.clipping == Clipping(NUM_CLIPPED, set())


def test_z_loss_changes_gradients_but_not_reported_losses(results: list[RankResult]) -> None:
    runs = results[0].runs
    np.testing.assert_allclose(runs["z tensor"], runs["z pipeline"], rtol=1e-4)
    (loss, norm), (loss_with_z, norm_with_z) = runs["none"][0], runs["z tensor"][0]
    assert loss_with_z == pytest.approx(loss, rel=1e-5)
    assert abs(norm_with_z - norm) > 1e-3 * norm


@pytest.mark.parametrize("embeddings", [False, True])
def test_weight_decay_exempts_norms_and_by_default_embeddings(
    results: list[RankResult], embeddings: bool
) -> None:
    matrices = {
        f"decoder.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    copies = ("embedding.word_embeddings.weight", "output_layer.weight")
    # The first pipeline stage has the embedding, the last one a copy of it.
    for rank_result, copy in zip(results, copies, strict=True):
        assert rank_result.decayed[embeddings] == (matrices | {copy} if embeddings else matrices)


def test_run_starts_with_the_moments_of_its_base_or_with_zero_moments(
    results: list[RankResult],
) -> None:
    for rank_result in results:
        base, loaded, fresh = (rank_result.states[name] for name in ("base", "loaded", "fresh"))
        assert base.moments.count_nonzero() > 0
        assert torch.equal(loaded.moments, base.moments)
        assert loaded.steps == base.steps == {2}
        assert fresh.moments.count_nonzero() == 0
        assert fresh.steps == {0}


def test_run_has_its_own_learning_rate_and_decay_whatever_state_it_starts_with(
    results: list[RankResult],
) -> None:
    for rank_result in results:
        loaded, fresh = (rank_result.states[name] for name in ("loaded", "fresh"))
        assert loaded.rates == fresh.rates
        assert {decay for _, decay in loaded.rates} == {0, 0.3}
        assert {rate for rate, _ in loaded.rates} != {
            rate for rate, _ in rank_result.states["base"].rates
        }
        assert loaded.betas == {(0.9, 0.8)}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_loss_and_no_gradient(
    results: list[RankResult], kind: str
) -> None:
    assert len(results[0].runs[kind]) == 2
    np.testing.assert_array_equal(results[0].runs[kind], results[0].runs["none"])
