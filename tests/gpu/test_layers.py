"""TransformerEngine's layers, fp8 and recomputation on one CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ul2r.config import Recipe
from ul2r.launch.worker import run_worker
from ul2r.model import layers
from ul2r.testing.gpu import gpu_recipe, is_rehearsal
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu

needs_cuda_kernels = pytest.mark.skipif(
    is_rehearsal(), reason="TransformerEngine's layers and fp8 need CUDA"
)


def make_recipe(storage: Path, name: str, **training: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    return gpu_recipe(storage, name=name, training=training)


def train(run: Recipe) -> dict[str, list[float]]:
    """Train; return losses and gradient norms in the order of the steps, and held-out losses of plain text."""
    tracker = MemoryTracker()
    run_worker(run, tracker)
    names = ("train/loss", "train/grad_norm", "causal/held_out_loss")
    return {name: [value for _, value in tracker.series(name)] for name in names}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_change_only_rounding(storage: Path, kind: str) -> None:
    recomputed = train(make_recipe(storage, kind, recompute=kind))
    kept = train(make_recipe(storage, "kept"))
    assert recomputed["train/loss"] == pytest.approx(kept["train/loss"], rel=1e-2)


@needs_cuda_kernels
@pytest.mark.parametrize("first", [True, False], ids=["engine first", "engine second"])
def test_layers_of_both_kinds_read_one_checkpoint_and_continue_alike(
    storage: Path, monkeypatch: pytest.MonkeyPatch, *, first: bool
) -> None:
    """A run of one kind of layer, resumed with the other from its third step, goes on as without the change."""
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")

    def use_engine(engine: bool) -> None:
        monkeypatch.setattr(layers, "uses_transformer_engine", lambda _: engine)

    run = make_recipe(storage, "run")
    use_engine(first)
    uninterrupted = train(run)
    (run.paths.checkpoints / "latest").write_text("step_00000003")
    use_engine(not first)
    resumed = train(run)
    # The first loss after the change is that of the same weights.
    assert resumed["train/loss"][0] == pytest.approx(uninterrupted["train/loss"][3], rel=1e-2)
    assert resumed["train/loss"] == pytest.approx(uninterrupted["train/loss"][3:], rel=2e-2)
    assert resumed["causal/held_out_loss"][-1] == pytest.approx(
        uninterrupted["causal/held_out_loss"][-1], rel=2e-2
    )


@needs_cuda_kernels
def test_engine_layers_in_fp8_train_nearly_as_bf16(storage: Path) -> None:
    """Losses within 5 %; the norm of the first gradient, of the same weights and batch, within 10 %."""
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
    in_fp8 = train(make_recipe(storage, "fp8", precision="fp8"))
    in_bf16 = train(make_recipe(storage, "bf16"))
    assert in_fp8["train/loss"] == pytest.approx(in_bf16["train/loss"], rel=5e-2)
    assert in_fp8["train/grad_norm"][0] == pytest.approx(in_bf16["train/grad_norm"][0], rel=0.1)
    # Equal numbers would mean that no product was computed in fp8.
    assert in_fp8["train/loss"][0] != in_bf16["train/loss"][0]
