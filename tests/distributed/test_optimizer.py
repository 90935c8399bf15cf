"""What is decayed, z-loss over a cut vocabulary, the optimizer's state from a base, and recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ul2r.config import Parallel, Recipe
from ul2r.testing.corpus import tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = pytest.mark.distributed

TENSOR_2 = {"num_workers": 2, "tensor": 2}
PIPELINE_2 = {"num_workers": 2, "pipeline": 2}
Z_WEIGHT = 0.1


@dataclass(frozen=True)
class Shared:
    """What one rank found out."""

    z_loss: ZLoss
    decayed: dict[bool, set[str]]
    """Parameters that weight decay changed, by `optimizer.decay_embeddings`."""
    states: dict[str, State]
    """The base's optimizer, and that of runs that begin with it, by `optimizer.load_optimizer_state`."""
    runs: dict[str, list[tuple[float, float]]]
    """Loss and gradient norm of each step: by `training.recompute`, and with z-loss by layout."""


@dataclass(frozen=True)
class ZLoss:
    """Of this rank's half of the vocabulary."""

    losses: torch.Tensor
    log_z: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class State:
    """Of an optimizer's moments and settings."""

    moments: torch.Tensor
    steps: set[float]
    rates: set[tuple[float, float]]
    betas: set[tuple[float, float]]


def everything(
    decays: dict[bool, tuple[Recipe, Recipe]],
    continued: dict[str, Recipe],
    runs: dict[str, Recipe],
) -> Shared:
    return Shared(
        z_loss=z_loss(),
        decayed={embeddings: decayed(*pair) for embeddings, pair in decays.items()},
        states={name: state(recipe) for name, recipe in continued.items()},
        runs={name: trained(recipe) for name, recipe in runs.items()},
    )


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """(S, B, V) logits and (B, S) labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 2, 16, generator=generator)
    return logits, torch.randint(0, 16, (2, 8), generator=generator)


def z_loss() -> ZLoss:
    """The loss with z-loss, of which each tensor rank has half of the logits."""
    from megatron.core import parallel_state

    from ul2r.model.build import build_model
    from ul2r.train.mesh import Mesh

    mesh = Mesh.join(Parallel(**TENSOR_2))
    recipe = tiny_recipe(Path("none"), parallel=TENSOR_2, optimizer={"z_loss": Z_WEIGHT})
    (model,) = build_model(recipe, 128)
    whole, labels = logits_and_labels()
    own = whole.chunk(2, dim=-1)[parallel_state.get_tensor_model_parallel_rank()]
    own = own.clone().requires_grad_()
    losses, log_z = model.compute_language_model_loss(labels, own * 1.0)
    (losses.sum() + Z_WEIGHT * log_z.square().sum()).backward()
    mesh.leave()
    assert own.grad is not None
    return ZLoss(losses.detach(), log_z.detach(), own.grad)


def decayed(without: Recipe, with_decay: Recipe) -> set[str]:
    """Parameters that a step with weight decay leaves elsewhere than one without."""
    after = []
    for recipe in (without, with_decay):
        (chunk,) = step_of(recipe, steps=1).chunks
        after.append({name: value.detach().clone() for name, value in chunk.named_parameters()})
    return {name for name, value in after[0].items() if not torch.equal(value, after[1][name])}


def step_of(recipe: Recipe, steps: int) -> Any:  # noqa: ANN401  a TrainStep, imported in the processes alone
    from ul2r.data.sampling.batches import Batches
    from ul2r.data.store.dataset import open_dataset
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    dataset = open_dataset(recipe.storage_paths.store)
    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, dataset.vocabulary.size)
    for number in range(steps):
        rows = Batches(recipe, dataset).rows(number, mesh.data_rank, recipe.parallel.data)
        step.train(number, rows)
    mesh.leave()
    return step


def state(recipe: Recipe) -> State:
    """The optimizer as a run begins, with two replicas that have half of it each."""
    from ul2r.data.store.dataset import open_dataset
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.loop import Trainer
    from ul2r.train.mesh import Mesh

    mesh = Mesh.join(recipe.parallel)
    loop = Trainer(
        recipe,
        open_dataset(recipe.storage_paths.store),
        mesh,
        MemoryTracker(),
        on_step=lambda *_: None,
        beat=lambda *_: None,
        writer_token="nobody",
    )
    loop.train_step.schedule.set(0)
    (part,) = loop.train_step.optimizer.chained_optimizers
    states = part.optimizer.state.values()
    groups = part.optimizer.param_groups
    mesh.leave()
    return State(
        moments=torch.cat(
            [one[name].ravel() for one in states for name in ("exp_avg", "exp_avg_sq")]
        ),
        steps={float(one["step"]) for one in states},
        rates={(group["lr"], group["weight_decay"]) for group in groups},
        betas={tuple(group["betas"]) for group in groups},
    )


def trained(recipe: Recipe) -> list[tuple[float, float]]:
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    tracker = MemoryTracker()
    run_worker(recipe, tracker, lambda *_: None)
    losses, norms = (tracker.series(f"train/{name}") for name in ("loss", "grad_norm"))
    return [(loss, norm) for (_, loss), (_, norm) in zip(losses, norms, strict=True)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer")
    tiny_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def found(storage: Path) -> list[Shared]:
    def decay(weight: float, *, embeddings: bool) -> Recipe:
        settings = {"weight_decay": weight, "decay_embeddings": embeddings}
        return tiny_recipe(storage, parallel=PIPELINE_2, optimizer=settings)

    quick = {
        "training": {"steps": 2},
        "validation": {"every": 9},
        "evaluation": {"mixture": "causal"},
    }
    base = tiny_recipe(storage, name="base", parallel={"num_workers": 2}, **quick)
    other = {"learning_rate": 3e-3, "weight_decay": 0.3, "beta2": 0.8}

    def begun(name: str, *, load: bool) -> Recipe:
        settings = {**other, "load_optimizer_state": load}
        workers = {"num_workers": 2}
        return tiny_recipe(
            storage, name=name, base="base", parallel=workers, optimizer=settings, **quick
        )

    cut_rows = TENSOR_2 | {"sequence_parallel": True}

    def run(name: str, parallel: dict[str, Any], **changes: object) -> Recipe:
        return tiny_recipe(storage, name=name, parallel=parallel, **quick | changes)

    def recompute(kind: str) -> Recipe:
        return run(kind, cut_rows, training={"steps": 2, "recompute": kind})

    with_z = {"z_loss": Z_WEIGHT}

    run_distributed(trained, 2, base)
    return run_distributed(
        everything,
        2,
        {one: (decay(0, embeddings=one), decay(0.5, embeddings=one)) for one in (False, True)},
        {
            "base": base,
            "kept": begun("kept", load=True),
            "fresh": begun("fresh", load=False),
        },
        {
            **{kind: recompute(kind) for kind in ("none", "selective", "full")},
            "z tensor": run("z-tensor", cut_rows, optimizer=with_z),
            "z pipeline": run("z-pipeline", PIPELINE_2, optimizer=with_z),
        },
    )


def test_z_loss_over_a_cut_vocabulary_is_that_of_the_whole_one(found: list[Shared]) -> None:
    logits, labels = logits_and_labels()
    logits = logits.double().requires_grad_()
    log_z = logits.logsumexp(-1).T
    losses = log_z - logits.gather(-1, labels.T[..., None])[..., 0].T
    (losses.sum() + Z_WEIGHT * log_z.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    for rank, shared in enumerate(found):
        own = shared.z_loss
        torch.testing.assert_close(own.losses.double(), losses.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.log_z.double(), log_z.detach(), atol=1e-5, rtol=1e-5)
        gradient = logits.grad.chunk(2, dim=-1)[rank]
        torch.testing.assert_close(own.gradient.double(), gradient, atol=1e-5, rtol=1e-5)


def test_z_loss_shows_in_gradients_and_not_in_the_losses_told(found: list[Shared]) -> None:
    runs = found[0].runs
    np.testing.assert_allclose(runs["z tensor"], runs["z pipeline"], rtol=1e-4)
    (loss, norm), (loss_with_z, norm_with_z) = runs["none"][0], runs["z tensor"][0]
    assert loss_with_z == pytest.approx(loss, rel=1e-5)
    assert abs(norm_with_z - norm) > 1e-3 * norm


@pytest.mark.parametrize("embeddings", [False, True])
def test_weight_decay_spares_norms_and_if_so_told_embeddings(
    found: list[Shared], embeddings: bool
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
    for shared, copy in zip(found, copies, strict=True):  # of the first and the last stage
        assert shared.decayed[embeddings] == (matrices | {copy} if embeddings else matrices)


def test_a_run_goes_on_with_its_bases_moments_or_begins_with_none(found: list[Shared]) -> None:
    for shared in found:
        base, kept, fresh = (shared.states[name] for name in ("base", "kept", "fresh"))
        assert base.moments.count_nonzero() > 0
        assert torch.equal(kept.moments, base.moments)
        assert kept.steps == base.steps == {2}
        assert fresh.moments.count_nonzero() == 0
        assert fresh.steps == {0}


def test_a_run_has_its_own_rates_whatever_state_it_begins_with(found: list[Shared]) -> None:
    for shared in found:
        kept, fresh = (shared.states[name] for name in ("kept", "fresh"))
        assert kept.rates == fresh.rates
        assert {decay for _, decay in kept.rates} == {0, 0.3}
        assert {rate for rate, _ in kept.rates} != {rate for rate, _ in shared.states["base"].rates}
        assert kept.betas == {(0.9, 0.8)}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_change_no_loss_and_no_gradient(
    found: list[Shared], kind: str
) -> None:
    assert len(found[0].runs[kind]) == 2
    np.testing.assert_array_equal(found[0].runs[kind], found[0].runs["none"])
