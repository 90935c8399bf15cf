"""A token store, and exports with its tokenizer: UL2R, causal, and denoising with causal attention."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ul2r.config import Architecture, Recipe
from ul2r.data.store.dataset import TokenDataset, open_dataset
from ul2r.inference import LanguageModel, read_export_metadata
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export

NUM_SENTINELS = 16


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of an exported UL2R run, whose token store exists."""
    storage = tmp_path_factory.mktemp("storage")
    export = write_tiny_export(storage / "runs/arm/export", num_sentinels=NUM_SENTINELS)
    vocabulary = read_export_metadata(export).vocabulary
    assert vocabulary is not None
    make_tiny_store(
        storage / "store",
        num_documents=40,
        vocabulary_size=vocabulary.size,
        num_sentinels=NUM_SENTINELS,
    )
    shutil.copy(storage / "store/tokenizer.json", export)

    return Recipe.model_validate(
        {
            "name": "arm",
            "storage": storage,
            "model": Architecture(
                num_layers=2, hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2
            ),
            "objective": {"sequence_length": 64},
            "training": {"steps": 1, "global_batch_size": 1},
            "data": {"num_sentinels": NUM_SENTINELS},
            "evaluation": {"num_rows": 6, "num_infill_examples": 5, "infill_context_length": 20},
        }
    )


@pytest.fixture(scope="session")
def dataset(recipe: Recipe) -> TokenDataset:
    return open_dataset(recipe.storage_paths.store)


@pytest.fixture(scope="session")
def ul2r_model(recipe: Recipe) -> LanguageModel:
    return LanguageModel.load(recipe.paths.export)


@pytest.fixture(scope="session")
def causal_model(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_causal_model(recipe, tmp_path_factory, denoising=False)


@pytest.fixture(scope="session")
def causal_ul2r_model(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Model trained on denoisers with causal attention."""
    return load_causal_model(recipe, tmp_path_factory, denoising=True)


def load_causal_model(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, *, denoising: bool
) -> LanguageModel:
    folder = tmp_path_factory.mktemp("causal") / "export"
    write_tiny_export(
        folder, attention="causal", denoising=denoising, num_sentinels=NUM_SENTINELS, seed=2
    )
    shutil.copy(recipe.storage_paths.store / "tokenizer.json", folder)
    return LanguageModel.load(folder)


@pytest.fixture(scope="session")
def uniform_model(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Model whose embeddings are all zero, so that every token is equally likely."""
    folder: Path = tmp_path_factory.mktemp("uniform") / "export"
    shutil.copytree(recipe.paths.export, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return LanguageModel.load(folder)
