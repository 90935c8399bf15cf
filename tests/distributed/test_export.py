"""An exported checkpoint computes the same function in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ul2r.config import HuggingFaceBase, Recipe
from ul2r.config.denoisers import has_sentinels
from ul2r.config.export import Export
from ul2r.data.store.dataset import open_dataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.losses import measure_denoiser_losses
from ul2r.inference import LanguageModel
from ul2r.launch.pretrained import check_base, fill_model_from_base
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed
from ul2r.testing.recipes import tiny_recipe
from ul2r.train.checkpoint.metadata import CheckpointInfo
from ul2r.train.checkpoint.storage import CheckpointStore, latest_valid
from ul2r.workflows.export import export

pytestmark = pytest.mark.distributed

LENGTH = 48


def train_and_run(recipe: Recipe, tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Train and return the trained Megatron model's logits, gathered over tensor ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from ul2r.data.store.dataset import open_dataset
    from ul2r.launch.worker import run_worker
    from ul2r.model.attention import pack_intervals
    from ul2r.tracking.tracker import MemoryTracker
    from ul2r.train.checkpoint.sharded_state import load_checkpoint
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    run_worker(recipe, MemoryTracker())

    mesh = Mesh.join(recipe.parallel)
    step = TrainStep(recipe, mesh, open_dataset(recipe.storage_paths.store).vocabulary.size)
    latest = latest_valid(CheckpointStore.from_recipe(recipe))
    assert latest is not None
    load_checkpoint(latest, step, optimizer=False)

    position = torch.arange(LENGTH).expand(len(tokens), -1)
    kv_end = np.maximum(position.numpy() + 1, prefix)
    logits = step.chunks[0](tokens, position, pack_intervals(0 * kv_end, kv_end))
    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(logits).detach()
    return gathered


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("export")
    make_tiny_store(
        folder / "store", vocabulary_size=500
    )  # not a multiple of 128: padding rows must be dropped
    return tiny_recipe(
        folder,
        training={"steps": 3},
        parallel={"num_workers": 2, "tensor": 2},
        optimizer={"learning_rate": 5e-2},
    )


def test_exported_logits_equal_the_trained_models(recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 500, (3, LENGTH)))
    trained, _ = run_distributed(train_and_run, 2, recipe, tokens, 20)
    folder = export(recipe)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    position = torch.arange(LENGTH)
    mask = (position[None] < torch.clamp(position + 1, min=20)[:, None]).expand(3, 1, -1, -1)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    assert trained.shape[-1] == 512
    torch.testing.assert_close(logits, trained[..., :500], atol=1e-4, rtol=1e-4)

    metadata = json.loads((folder / "ul2r.json").read_text())
    assert (metadata["attention"], metadata["denoising"]) == ("prefix", True)
    assert (metadata["step"], metadata["tokens"]) == (3, 3 * 8 * 64)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Every child sees the moon."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == metadata["vocabulary"]["eos"]

    readme = (folder / "README.md").read_text()
    store = open_dataset(recipe.storage_paths.store)
    assert f"fingerprint `{store.manifest.fingerprint}`" in readme
    assert "learning_rate: 0.05" in readme


def train_and_evaluate(recipe: Recipe) -> list[dict[str, float]]:
    """Train and return the held-out losses in the order of their measurement."""
    from ul2r.launch.worker import run_worker
    from ul2r.tracking.tracker import MemoryTracker

    tracker = MemoryTracker()
    run_worker(recipe, tracker)
    measured = [
        {name: value for name, value in metrics.items() if "/held_out_" in name}
        for _, metrics in tracker.records
    ]
    return [losses for losses in measured if losses]


@pytest.fixture(scope="module")
def first(recipe: Recipe) -> tuple[Recipe, list[dict[str, float]]]:
    """Train a run; return it and its held-out losses."""
    trained = recipe.model_copy(update={"name": "first"})
    return trained, run_distributed(train_and_evaluate, 2, trained)[0]


def test_a_run_starts_from_an_export_as_from_the_checkpoint(
    recipe: Recipe, first: tuple[Recipe, list[dict[str, float]]]
) -> None:
    """With the export as its base, in another layout, its first losses equal the exported run's last.

    Not to the last digit: in training the softmax runs over padding rows as well, which an export drops.
    """
    trained, before = first
    folder = export(trained)
    tree = recipe.model_dump(mode="json") | {"name": "next", "base": {"hf": str(folder)}}
    tree |= {"parallel": {"num_workers": 2, "pipeline": 2}, "model": {"num_layers": 4}}
    fill_model_from_base(tree)
    follower = Recipe.model_validate(tree)
    assert isinstance(follower.base, HuggingFaceBase)
    check_base(follower, open_dataset(recipe.storage_paths.store))
    after, _ = run_distributed(train_and_evaluate, 2, follower)
    assert after[0] == pytest.approx(before[-1], rel=5e-4)
    assert after[-1] != pytest.approx(after[0], rel=1e-2)
    latest = latest_valid(CheckpointStore.from_recipe(follower))
    assert latest is not None
    info = CheckpointInfo.read(latest)
    assert (info.base_id or "").startswith("hf-")
    assert info.tokens == 3 * 8 * 64
    # The export tells what its run has read: its follower of the same seed reads in another order.
    assert info.data is not None
    assert [use["run"] for use in info.data["history"]] == [trained.name]
    assert info.data["order"]["seed"] != follower.seed == trained.seed


def test_losses_of_text_and_sentinels_are_those_of_the_export(
    first: tuple[Recipe, list[dict[str, float]]],
) -> None:
    trained, before = first
    num_rows = trained.validation.num_rows
    evaluation = trained.evaluation.model_copy(update={"num_rows": num_rows})
    measured = trained.model_copy(update={"evaluation": evaluation})
    model = LanguageModel.load(export(trained))
    dataset = open_dataset(trained.storage_paths.store)
    split = [denoiser for denoiser in evaluation.mixture if has_sentinels(denoiser)]
    assert split
    for denoiser in evaluation.mixture:
        scores = measure_denoiser_losses(model, dataset, measured, denoiser)
        expected = {kind: score.mean for kind, score in scores.items()}
        losses = {"all": before[-1][f"{denoiser.name}/held_out_loss"]}
        for kind in ("text", "sentinel"):
            name = f"{denoiser.name}/held_out_{kind}_loss"
            assert (name in before[-1]) == (denoiser in split)
            if denoiser in split:
                losses[kind] = before[-1][name]
        # An export drops the padding rows, 12 of 512, which in training take some of the softmax: about log(512 / 500).
        assert losses == pytest.approx(expected, abs=0.03)
        # They take nearly the same of every target, so that differences of losses are exact.
        for kind in losses.keys() - {"all"}:
            difference = expected[kind] - expected["all"]
            assert losses[kind] - losses["all"] == pytest.approx(difference, abs=1e-3)


def test_a_chosen_checkpoint_is_exported_to_a_folder_of_its_own(
    first: tuple[Recipe, list[dict[str, float]]],
) -> None:
    """A copy of the run's checkpoint is exported; a damaged one is refused and nothing is written."""
    trained, _ = first
    last = export(trained)
    latest = latest_valid(CheckpointStore.from_recipe(trained))
    assert latest is not None
    copy = Path(shutil.copytree(latest, trained.storage / "copied"))
    chosen = trained.model_copy(update={"export": Export(checkpoint=copy)})
    folder = export(chosen)
    assert folder.name == "export-copied"
    for name in ("model.safetensors", "ul2r.json", "config.json"):
        assert (folder / name).read_bytes() == (last / name).read_bytes()

    # An older version's config.json may say something else than the model: it is written again.
    config = json.loads((folder / "config.json").read_text())
    wrong = json.dumps(config | {"rms_norm_eps": 0.5})
    (folder / "config.json").write_text(wrong)
    export(chosen)
    assert (folder / "config.json").read_bytes() == (last / "config.json").read_bytes()

    shutil.rmtree(folder)
    damaged = max(copy.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{copy}: has .* of {damaged.name}"):
        export(chosen)
    assert not folder.exists()


def test_a_run_without_a_checkpoint_is_refused_by_name(recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match="run 'nobody' has no checkpoint"):
        export(recipe.model_copy(update={"name": "nobody"}))
