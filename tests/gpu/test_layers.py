"""TransformerEngine's layers, fp8 and recomputation on one CUDA device. Not run yet: no GPU was available."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ul2r.config import Recipe
from ul2r.launch.worker import run_worker
from ul2r.model import layers
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import init_single_gpu_group
from ul2r.testing.recipes import tiny_recipe
from ul2r.tracking.tracker import MemoryTracker

pytestmark = pytest.mark.gpu


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """Make a token store and a process group of this process alone."""
    make_tiny_store(tmp_path / "store")
    init_single_gpu_group(tmp_path / "rendezvous")
    yield tmp_path
    dist.destroy_process_group()


def make_recipe(storage: Path, name: str, **training: Any) -> Recipe:  # noqa: ANN401  values of a recipe
    return tiny_recipe(storage, name=name, launch={"gpus_per_worker": 1}, training=training)


def train(run: Recipe) -> list[float]:
    tracker = MemoryTracker()
    run_worker(run, tracker)
    return [value for _, value in tracker.series("train/loss")]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_change_only_rounding(storage: Path, kind: str) -> None:
    recomputed = train(make_recipe(storage, kind, recompute=kind))
    assert recomputed == pytest.approx(train(make_recipe(storage, "kept")), rel=1e-2)


def test_layers_of_both_kinds_train_the_same_and_resume_each_others_checkpoints(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")

    def use_engine(engine: bool) -> None:
        monkeypatch.setattr(layers, "uses_transformer_engine", lambda _: engine)

    for first, second in ((True, False), (False, True)):
        run = make_recipe(storage, f"engine-{first}")
        use_engine(first)
        uninterrupted = train(run)
        (run.paths.folder / "checkpoints/latest").write_text("step_00000003")
        use_engine(second)
        assert train(run) == pytest.approx(uninterrupted[3:], rel=2e-2)


def test_fp8_trains_nearly_as_bf16(storage: Path) -> None:
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
    in_fp8 = train(make_recipe(storage, "fp8", precision="fp8"))
    assert in_fp8 == pytest.approx(train(make_recipe(storage, "bf16")), rel=5e-2)
