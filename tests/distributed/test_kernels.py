"""Runs with fused kernels learn what plain ones do, and either resumes the other's checkpoint."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        shutil.which("g++") is None,
        reason="torch compiles with g++ on a CPU, which is not installed",
    ),
]

TENSOR_2 = {"num_workers": 2, "tensor": 2}
FUSED = {"swiglu": "fused", "rope": "fused", "optimizer": "fused"}
NUM_STEPS = 4
Z_WEIGHT = 0.1


@dataclass
class Run:
    """Record of a run on one rank."""

    loss: list[float]
    norm: list[float]
    is_fused: set[bool]
    """Flag `fused` of torch's AdamW, by parameter group."""
    num_graphs: int
    """Functions that torch compiled for it."""
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loss:
    """Losses and log Z (2, B, S), and the gradient of this rank's half of the logits (S, B, V / 2)."""

    losses: torch.Tensor
    gradient: torch.Tensor


def measure(recipes: dict[str, Recipe]) -> tuple[dict[str, Run], dict[bool, Loss]]:
    """Measure everything in one pair of processes, which compile the kernels once."""
    runs = {}
    for name, recipe in recipes.items():
        if source := recipes.get(name.partition(" to ")[0] if " to " in name else ""):
            if dist.get_rank() == 0:
                hand_over(source, recipe)
            dist.barrier()
        runs[name] = train(recipe)
    return runs, {is_fused: compute_loss(is_fused=is_fused) for is_fused in (False, True)}


def hand_over(source: Recipe, target: Recipe) -> None:
    """Give a run another one's checkpoint of step 2, as if it had been stopped there."""
    folder = target.paths.checkpoints
    folder.mkdir(parents=True)
    (folder / "step_00000002").symlink_to(source.paths.checkpoints / "step_00000002")
    (folder / "latest").write_text("step_00000002")


def train(recipe: Recipe) -> Run:
    from torch._dynamo.utils import counters

    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.loop import Trainer

    fused: set[bool] = set()

    class WatchedTrainer(Trainer):
        def fit(self, *source: Any) -> Any:  # noqa: ANN401  as there
            fused.update(
                bool(group.get("fused")) for group in self.train_step.optimizer.param_groups
            )
            return super().fit(*source)

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    logger, collector = logging.getLogger("ul2r.train.step"), Collector()
    logger.setLevel(logging.INFO)
    logger.addHandler(collector)
    counters.clear()
    tracker = MemoryTracker()
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("ul2r.launch.worker.Trainer", WatchedTrainer)
        run_worker(recipe, tracker)
    logger.removeHandler(collector)
    loss, norm = ([v for _, v in tracker.series(f"train/{n}")] for n in ("loss", "grad_norm"))
    return Run(loss, norm, fused, counters["stats"]["unique_graphs"], messages)


def make_logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (S, B, V) bf16 logits and (B, S) labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 2, 16, generator=generator)
    return logits.bfloat16(), torch.randint(0, 16, (2, 8), generator=generator)


def compute_loss(*, is_fused: bool) -> Loss:
    """Compute loss and z-loss of a model in bf16, of which each tensor rank has half of the logits."""
    from ul2r.model.build import build_model
    from ul2r.model.kernels import KernelPlan
    from ul2r.train.mesh import Mesh

    recipe = tiny_recipe(Path("none"), parallel=TENSOR_2, optimizer={"z_loss": Z_WEIGHT})
    mesh = Mesh.join(recipe.parallel)
    plan = KernelPlan(loss="torch.compile" if is_fused else None)
    (model,) = build_model(recipe, 128, plan)
    whole, labels = make_logits_and_labels()
    own = whole.chunk(2, dim=-1)[mesh.rank].clone().requires_grad_()

    # Times 1.0: Megatron-Core's cross entropy works in place, which autograd refuses for a leaf.
    losses = model.compute_language_model_loss(labels, own * 1.0)
    (losses[0].sum() + Z_WEIGHT * losses[1].square().sum()).backward()
    mesh.leave()
    assert own.grad is not None
    return Loss(losses.detach(), own.grad)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, Run], dict[bool, Loss]]]:
    storage = tmp_path_factory.mktemp("kernels")
    make_tiny_store(storage / "store")

    def recipe(name: str, kernels: dict[str, str]) -> Recipe:
        return tiny_recipe(
            storage,
            name=name.replace(" ", "-"),
            kernels=kernels,
            parallel=TENSOR_2 | {"sequence_parallel": True},
            training={"steps": NUM_STEPS},
            checkpoints={"every": 2},
            evaluation={"mixture": "causal"},
        )

    recipes = {
        "plain": recipe("plain", {}),
        "fused": recipe("fused", FUSED),
        "plain to fused": recipe("plain to fused", FUSED),
        "fused to plain": recipe("fused to plain", {}),
    }
    return run_distributed(measure, 2, recipes)


def test_fused_kernels_change_only_rounding(
    results: list[tuple[dict[str, Run], dict[bool, Loss]]],
) -> None:
    for runs, _ in results:
        plain, fused = runs["plain"], runs["fused"]
        assert (plain.is_fused, plain.num_graphs) == ({False}, 0)
        assert fused.is_fused == {True}
        assert fused.num_graphs > 2
        assert len(plain.loss) == NUM_STEPS * (plain is results[0][0]["plain"])
        np.testing.assert_allclose(fused.loss, plain.loss, rtol=1e-5)
        np.testing.assert_allclose(fused.norm, plain.norm, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain to fused", "fused to plain"])
def test_a_run_resumes_with_other_kernels(
    results: list[tuple[dict[str, Run], dict[bool, Loss]]], name: str
) -> None:
    runs = results[0][0]
    assert runs[name].is_fused == {name.endswith("fused")}
    np.testing.assert_allclose(runs[name].loss, runs["plain"].loss[2:], rtol=1e-5)
    np.testing.assert_allclose(runs[name].norm, runs["plain"].norm[2:], rtol=1e-4)


def test_the_kernels_of_a_run_are_told_once(
    results: list[tuple[dict[str, Run], dict[bool, Loss]]],
) -> None:
    first, second = (runs for runs, _ in results)
    assert first["fused"].messages == [
        "fused: kernels: swiglu and rope by torch.compile; optimizer by torch's fused AdamW; "
        "loss plain (needs a GPU)"
    ]
    assert second["fused"].messages == []


def test_fused_loss_and_z_loss_equal_plain_ones_and_float64(
    results: list[tuple[dict[str, Run], dict[bool, Loss]]],
) -> None:
    """Losses are fp32. Gradients are sums of two that were rounded to bf16, by up to 2^-9 of values of up to 2."""
    logits, labels = make_logits_and_labels()
    exact = logits.double().requires_grad_()
    log_z = exact.logsumexp(-1).T
    losses = log_z - exact.gather(-1, labels.T[..., None])[..., 0].T
    (losses.sum() + Z_WEIGHT * log_z.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    expected = torch.stack((losses, log_z)).detach()
    for rank, (_, by_kernel) in enumerate(results):
        gradient = exact.grad.chunk(2, dim=-1)[rank]
        for loss in by_kernel.values():
            torch.testing.assert_close(loss.losses.double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loss.gradient.double(), gradient, atol=2**-7, rtol=2**-7)
        torch.testing.assert_close(by_kernel[True].losses, by_kernel[False].losses)
        assert by_kernel[True].gradient.dtype is torch.bfloat16
