"""Every family, imported, trained and exported in every layout, computes the same function as in transformers."""

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
from ul2r.config.training import NewEmbeddings
from ul2r.data.tokenizer import load_tokenizer, train_tokenizer
from ul2r.inference import LanguageModel
from ul2r.inference.generation import IncrementalDecoder
from ul2r.model.export_metadata import ExportMetadata
from ul2r.model.huggingface.checkpoint_reader import MegatronCheckpointReader
from ul2r.model.huggingface.config_json import read_architecture
from ul2r.model.huggingface.exporting import convert_tensors, write_export
from ul2r.model.huggingface.new_embeddings import draw_rows
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
LENGTH = 48
PREFIX = 20
VOCABULARY = 500


@dataclass(frozen=True)
class TrainedModel:
    """Model that was imported and trained for two steps.

    Attributes:
        imported_logits: Logits before training, (B, S, V).
        trained_logits: Logits after training, (B, S, V).
        losses: Loss of each step.
        gradient_norms: Gradient norm of each step.
    """

    imported_logits: Tensor
    trained_logits: Tensor
    losses: list[float]
    gradient_norms: list[float]


def import_and_train(recipes: list[Recipe], tokens: Tensor) -> list[TrainedModel | None]:
    """Import, save, take two steps and save again, for each recipe; None on ranks without logits."""
    from ul2r.data.sampling.batches import BatchBuilder
    from ul2r.data.store.dataset import open_dataset
    from ul2r.testing.layouts import gather_logits, save_weights
    from ul2r.train.checkpoint.pretrained import load_pretrained
    from ul2r.train.mesh import Mesh
    from ul2r.train.step import TrainStep

    mesh = Mesh.join(recipes[0].parallel)
    models = []
    for recipe in recipes:
        dataset = open_dataset(recipe.storage_paths.store)
        step = TrainStep(recipe, mesh, dataset.vocabulary.size)
        assert isinstance(recipe.base, HuggingFaceBase)
        load_pretrained(recipe, recipe.base, step)
        imported = gather_logits(step.chunks[0], tokens, PREFIX)
        save_weights(step.chunks, recipe.paths.folder / "imported")

        batches = BatchBuilder(recipe, dataset)
        results = [
            take_step(step, number, batches.build(number, mesh.data_rank, recipe.parallel.data))
            for number in range(2)
        ]
        trained = gather_logits(step.chunks[0], tokens, PREFIX)
        save_weights(step.chunks, recipe.paths.folder / "trained")

        losses = [result.losses.mean for result in results]
        norms = [result.gradient_norm for result in results]
        model = TrainedModel(imported, trained, losses, norms)
        models.append(model if mesh.is_last_stage else None)
    return models


def import_embeddings(recipe: Recipe, vocabulary_size: int) -> dict[str, Tensor]:
    """Return this rank's rows of an imported embedding by `training.new_embeddings`, for `vocabulary_size` tokens."""
    from ul2r.model.build import build_model
    from ul2r.model.huggingface.importing import load_weights
    from ul2r.model.huggingface.safetensors_reader import SafetensorsReader
    from ul2r.train.mesh import Mesh

    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, vocabulary_size)
    assert isinstance(recipe.base, HuggingFaceBase)
    weight: Tensor = model.embedding.word_embeddings.weight
    choices: tuple[NewEmbeddings, ...] = ("mean", "mean_plus_noise", "rare_subwords")
    embeddings: dict[str, Tensor] = {}
    for choice in choices:
        with SafetensorsReader(Path(recipe.base.hf), recipe.model.family) as reader:
            load_weights(model, reader, recipe.model, choice, seed=3)
        embeddings[choice] = weight.detach().clone()
    return embeddings


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


def make_recipe(storage: Path, name: str, layout: str) -> Recipe:
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
def trained(
    storage: Path, models: dict[str, PreTrainedModel], tokens: Tensor
) -> dict[tuple[str, str], TrainedModel]:
    """Train every family in every layout, with one set of processes per layout."""
    trained: dict[tuple[str, str], TrainedModel] = {}
    for layout, parallel in LAYOUTS.items():
        recipes = [make_recipe(storage, name, layout) for name in models]
        num_workers = parallel.get("num_workers", 1)
        *_, last = run_distributed(import_and_train, num_workers, recipes, tokens)
        trained |= {(name, layout): model for name, model in zip(models, last, strict=True)}
    return trained


def export(storage: Path, name: str, layout: str, checkpoint: str) -> Path:
    """Export a checkpoint of a run, "imported" or "trained", and return the folder."""
    recipe = make_recipe(storage, name, layout)
    architecture: Architecture = recipe.model
    dataset = make_tiny_store(storage / "vocabulary", vocabulary_size=VOCABULARY)
    folder = recipe.paths.folder / f"{checkpoint}-export"
    reader = MegatronCheckpointReader(recipe.paths.folder / checkpoint)
    write_export(
        folder,
        convert_tensors(reader, architecture, VOCABULARY),
        architecture=architecture,
        max_positions=LENGTH,
        metadata=ExportMetadata(
            "tiny", attention="prefix", denoising=True, step=2, vocabulary=dataset.vocabulary
        ),
        tokenizer=dataset.tokenizer_file,
        shard_bytes=2**30,
    )
    return folder


def test_new_rows_of_the_embedding_are_as_the_recipe_says(
    storage: Path, models: dict[str, PreTrainedModel]
) -> None:
    """On two ranks the first has old rows only, the second both."""
    train_tokenizer(["a text of few words"], VOCABULARY, num_sentinels=2).save(
        str(storage / "Llama 3.2/tokenizer.json")
    )
    tokenizer = load_tokenizer(storage / "Llama 3.2/tokenizer.json")
    added = set(tokenizer.get_added_tokens_decoder())
    original = models["Llama 3.2"].get_input_embeddings().weight.detach()
    parts = run_distributed(import_embeddings, 2, make_recipe(storage, "Llama 3.2", "TP 2"), 600)
    embeddings = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    for embedding in embeddings.values():
        assert embedding.shape == (640, 32)
        assert torch.equal(embedding[:VOCABULARY], original)

    new = {kind: embedding[VOCABULARY:] for kind, embedding in embeddings.items()}
    torch.testing.assert_close(new["mean"], original.mean(0).expand(140, -1))
    # 140 draws of 32 columns: the ratio of widths has an error of 1 / sqrt(2 x 140 x 32), a mean of 1 / sqrt(140).
    noise = (new["mean_plus_noise"] - original.mean(0)) / original.std(0)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(noise.mean(0).abs().max()) < 5 / 140**0.5
    # By the number of the new row, whichever rank has it.
    moments = original.mean(0), original.std(0, correction=0)
    drawn = draw_rows(*moments, "3/embedding.word_embeddings.weight", range(140))
    torch.testing.assert_close(new["mean_plus_noise"], drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == 140
    rare = [token for token in range(tokenizer.get_vocab_size() - 1, -1, -1) if token not in added]
    assert torch.equal(new["rare_subwords"], original[rare[:140]])


def initialize_norms(recipe: Recipe) -> list[Tensor]:
    """Return the vectors among the weights of a new model."""
    from ul2r.model.build import build_model
    from ul2r.train.mesh import Mesh

    Mesh.join(recipe.parallel)
    (model,) = build_model(recipe, VOCABULARY)
    return [weight.detach().clone() for weight in model.parameters() if weight.dim() == 1]


def test_norms_of_a_new_model_are_neutral(storage: Path) -> None:
    for changes, neutral in ((GEMMA_3, 0), ({}, 1)):
        (norms,) = run_distributed(initialize_norms, 1, tiny_recipe(storage, model=changes))
        assert len(norms) == 4 * (6 if changes else 2) + 1
        assert all((norm == neutral).all() for norm in norms)


CASES = [(name, layout) for layout in LAYOUTS for name in MODELS]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_imported_logits_equal_those_of_transformers(
    models: dict[str, PreTrainedModel],
    trained: dict[tuple[str, str], TrainedModel],
    tokens: Tensor,
    name: str,
    layout: str,
) -> None:
    ours = trained[name, layout].imported_logits
    assert ours.shape[-1] == 512
    expected = compute_reference_logits(models[name], tokens, PREFIX)
    torch.testing.assert_close(ours[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_takes_the_same_steps(
    trained: dict[tuple[str, str], TrainedModel], name: str, layout: str
) -> None:
    ours = trained[name, layout]
    single = trained[name, "single"]
    assert ours.losses == pytest.approx(single.losses, rel=1e-4)
    assert ours.gradient_norms == pytest.approx(single.gradient_norms, rel=1e-3)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_export_of_an_import_has_the_same_tensors_bit_for_bit(
    storage: Path, trained: dict[tuple[str, str], TrainedModel], name: str, layout: str
) -> None:
    assert (name, layout) in trained
    folder = export(storage, name, layout, "imported")
    original = load_file(storage / name / "model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert original.keys() == exported.keys()
    for key, tensor in original.items():
        assert torch.equal(tensor, exported[key]), key
    assert read_architecture(folder) == read_architecture(storage / name)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_exported_logits_equal_the_trained_models(
    storage: Path,
    trained: dict[tuple[str, str], TrainedModel],
    tokens: Tensor,
    name: str,
    layout: str,
) -> None:
    from transformers import AutoModelForCausalLM

    before = trained[name, layout].imported_logits[..., :VOCABULARY]
    after = trained[name, layout].trained_logits[..., :VOCABULARY]
    assert (after - before).abs().max() > 0.1
    folder = export(storage, name, layout, "trained")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    exported = compute_reference_logits(model, tokens, PREFIX)
    torch.testing.assert_close(exported, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_served_token_by_token(
    storage: Path, trained: dict[tuple[str, str], TrainedModel], tokens: Tensor, name: str
) -> None:
    """Inputs in both directions, then one token at a time with cached keys and values, give the trained logits."""
    expected = trained[name, "single"].trained_logits[0, :, :VOCABULARY]
    model = LanguageModel.load(export(storage, name, "single", "trained"))
    decoder = IncrementalDecoder(model, tokens[0, :PREFIX].tolist(), bidirectional=True)
    for position in range(PREFIX, PREFIX + 4):
        torch.testing.assert_close(decoder.logits, expected[position - 1], atol=1e-4, rtol=1e-4)
        decoder.feed(int(tokens[0, position]))
