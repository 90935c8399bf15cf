"""Every family: imported, trained and exported in every layout, it is the function that `transformers` computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ul2r.config import Architecture, HuggingFaceBase, Recipe
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.exporting import convert_tensors, write_export
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.distributed import run_distributed, take_step
from ul2r.testing.families import MODELS, compute_reference_logits, write_random_model
from ul2r.testing.recipes import GEMMA_3, tiny_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "TP 2": {"num_workers": 2, "tensor": 2},
    "PP 2": {"num_workers": 2, "pipeline": 2},
}
LENGTH, PREFIX, VOCABULARY = 48, 20, 500


@dataclass(frozen=True)
class Carried:
    """Logits of the last stage before and after training, (B, S, V)."""

    imported: Tensor
    trained: Tensor
    losses: list[float]
    gradient_norms: list[float]


def carry(recipes: list[Recipe], tokens: Tensor) -> list[Carried | None]:
    """Import, save, take two steps and save again, each recipe in turn; None on ranks without logits."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.testing.layouts import gather_logits, save_weights
    from ul2r.train.checkpoint.pretrained import load_pretrained
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    mesh = Mesh.join(recipes[0].parallel)
    found = []
    for recipe in recipes:
        dataset = open_dataset(recipe.storage_paths.store)
        step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        assert isinstance(recipe.base, HuggingFaceBase)
        load_pretrained(recipe, recipe.base, step)
        imported = gather_logits(step.chunks[0], tokens, PREFIX)
        save_weights(step.chunks, recipe.paths.folder / "imported")
        batches = BatchBuilder(recipe, dataset)
        taken = [
            take_step(step, number, batches.build(number, mesh.data_rank, recipe.parallel.data))
            for number in range(2)
        ]
        trained = gather_logits(step.chunks[0], tokens, PREFIX)
        save_weights(step.chunks, recipe.paths.folder / "trained")
        losses = [result.losses.mean for result in taken]
        norms = [result.gradient_norm for result in taken]
        found.append(Carried(imported, trained, losses, norms) if mesh.is_last_stage else None)
    return found


def embedding_of(recipe: Recipe, vocabulary_size: int) -> Tensor:
    """This rank's rows of an imported embedding, for a tokenizer of so many entries."""
    from ul2r.model.build import build_model
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
    from ul2r.train.mesh import Mesh

    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, vocabulary_size)
    assert isinstance(recipe.base, HuggingFaceBase)
    with SafetensorsReader(Path(recipe.base.hf), recipe.model) as source:
        load_weights(model, source, recipe.model)
    rows: Tensor = model.embedding.word_embeddings.weight.detach().clone()
    return rows


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    make_tiny_store(folder / "store", vocabulary_size=VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def models(storage: Path) -> dict[str, PreTrainedModel]:
    return {name: write_random_model(name, storage / name) for name in MODELS}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH)))


def recipe_of(storage: Path, name: str, layout: str) -> Recipe:
    architecture = read_architecture(storage / name)
    parallel: dict[str, Any] = dict(LAYOUTS[layout])
    if architecture.num_experts is not None and "tensor" in parallel:
        parallel["sequence_parallel"] = True
    return tiny_recipe(
        storage,
        name=f"{name} {layout}".replace(" ", "-").replace(",", ""),
        base={"hf": str(storage / name)},
        model=architecture.model_dump(),
        parallel=parallel,
        optimizer={"learning_rate": 3e-2},
    )


@pytest.fixture(scope="module")
def carried(
    storage: Path, models: dict[str, PreTrainedModel], tokens: Tensor
) -> dict[tuple[str, str], Carried]:
    """Every family in every layout, by one set of processes for each layout."""
    found: dict[tuple[str, str], Carried] = {}
    for layout, parallel in LAYOUTS.items():
        recipes = [recipe_of(storage, name, layout) for name in models]
        *_, last = run_distributed(carry, parallel.get("num_workers", 1), recipes, tokens)
        found |= {(name, layout): one for name, one in zip(models, last, strict=True)}
    return found


def exported(storage: Path, name: str, layout: str, what: str) -> Path:
    """The checkpoint of a run as a Hugging Face folder."""
    recipe = recipe_of(storage, name, layout)
    architecture: Architecture = recipe.model
    dataset = make_tiny_store(storage / "vocabulary", vocabulary_size=VOCABULARY)
    folder = recipe.paths.folder / f"{what}-export"
    write_export(
        folder,
        convert_tensors(
            MegatronCheckpointReader(recipe.paths.folder / what), architecture, VOCABULARY
        ),
        architecture=architecture,
        max_positions=LENGTH,
        metadata=ExportMetadata(
            "tiny", attention="prefix", denoising=True, step=2, vocabulary=dataset.vocabulary
        ),
        tokenizer=dataset.tokenizer_file,
        shard_bytes=2**30,
    )
    return folder


def test_new_rows_of_the_embedding_are_the_mean_of_the_others(
    storage: Path, models: dict[str, PreTrainedModel]
) -> None:
    """On two ranks, of which the first has old rows alone and the second both."""
    parts = run_distributed(embedding_of, 2, recipe_of(storage, "Llama 3.2", "TP 2"), 600)
    rows, old = torch.cat(parts), models["Llama 3.2"].get_input_embeddings().weight
    assert rows.shape == (640, 32)
    assert torch.equal(rows[:VOCABULARY], old)
    torch.testing.assert_close(rows[VOCABULARY:], old.mean(0).expand(140, -1))


def norms_of(recipe: Recipe) -> list[Tensor]:
    """Weights of a new model that are no matrices."""
    from ul2r.model.build import build_model
    from ul2r.train.mesh import Mesh

    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, VOCABULARY)
    return [one.detach().clone() for one in model.parameters() if one.dim() == 1]


def test_a_new_model_begins_with_norms_that_change_nothing(storage: Path) -> None:
    for changes, neutral in ((GEMMA_3, 0), ({}, 1)):
        (norms,) = run_distributed(norms_of, 1, tiny_recipe(storage, model=changes))
        assert len(norms) == 4 * (6 if changes else 2) + 1
        assert all((norm == neutral).all() for norm in norms)


EVERY = [(name, layout) for layout in LAYOUTS for name in MODELS]


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_imported_logits_are_those_of_transformers(
    models: dict[str, PreTrainedModel],
    carried: dict[tuple[str, str], Carried],
    tokens: Tensor,
    name: str,
    layout: str,
) -> None:
    ours = carried[name, layout].imported
    assert ours.shape[-1] == 512
    expected = compute_reference_logits(models[name], tokens, PREFIX)
    torch.testing.assert_close(ours[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_every_layout_takes_the_same_steps(
    carried: dict[tuple[str, str], Carried], name: str, layout: str
) -> None:
    ours, single = carried[name, layout], carried[name, "single"]
    assert ours.losses == pytest.approx(single.losses, rel=1e-4)
    assert ours.gradient_norms == pytest.approx(single.gradient_norms, rel=1e-3)


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_export_of_an_import_has_the_same_tensors_bit_for_bit(
    storage: Path, carried: dict[tuple[str, str], Carried], name: str, layout: str
) -> None:
    assert (name, layout) in carried
    folder = exported(storage, name, layout, "imported")
    before, after = (load_file(place / "model.safetensors") for place in (storage / name, folder))
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert torch.equal(value, after[tensor]), tensor
    assert read_architecture(folder) == read_architecture(storage / name)


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_exported_logits_are_the_trained_models(
    storage: Path, carried: dict[tuple[str, str], Carried], tokens: Tensor, name: str, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    trained = carried[name, layout].trained[..., :VOCABULARY]
    assert (trained - carried[name, layout].imported[..., :VOCABULARY]).abs().max() > 0.1
    model = AutoModelForCausalLM.from_pretrained(exported(storage, name, layout, "trained")).eval()
    torch.testing.assert_close(
        compute_reference_logits(model, tokens, PREFIX), trained, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_served_token_by_token(
    storage: Path, carried: dict[tuple[str, str], Carried], tokens: Tensor, name: str
) -> None:
    """Inputs in both directions, then one token at a time with keys and values kept: the trained model's logits."""
    trained = carried[name, "single"].trained[0, :, :VOCABULARY]
    model = LanguageModel.load(exported(storage, name, "single", "trained"))
    decoder = IncrementalDecoder(model, tokens[0, :PREFIX].tolist(), bidirectional=True)
    for place in range(PREFIX, PREFIX + 4):
        torch.testing.assert_close(decoder.logits, trained[place - 1], atol=1e-4, rtol=1e-4)
        decoder.feed(int(tokens[0, place]))
