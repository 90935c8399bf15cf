"""The model card of an export: its origin, and its scores as soon as there are any."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.config.recorded_recipe import record_recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.scores import Score, Scores
from ul2r.evaluation.stored_scores import save_scores
from ul2r.model.export_examples import Example, read_examples
from ul2r.model.export_metadata import ExportMetadata
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.model_card import add_scores, write_card

METADATA = ExportMetadata(
    "tiny", attention="prefix", denoising=True, step=7, tokens=1234, flops=5e9, checkpoint="none"
)


def scores(loss: float) -> Scores:
    return Scores({"perplexity": Score(loss, 0.25, 64)})


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return make_tiny_store(tmp_path / "store", num_documents=12)


@pytest.fixture
def recipe(tmp_path: Path, dataset: TokenDataset) -> Recipe:
    recipe = tiny_recipe(tmp_path)
    write_tiny_export(export_folder(recipe))
    shutil.copy(tmp_path / "store" / "tokenizer.json", export_folder(recipe))
    return recipe


def export_folder(recipe: Recipe) -> Path:
    return recipe.paths.export


def test_card_states_the_origin_of_the_model(recipe: Recipe, dataset: TokenDataset) -> None:
    write_card(export_folder(recipe), recipe, dataset, METADATA)
    text = (export_folder(recipe) / "README.md").read_text()
    assert "Step 7 of a run on 1,234 row positions and 5e+09 training FLOPs" in text
    assert f"fingerprint `{dataset.manifest.fingerprint}`" in text
    assert "sequence_length: 64" in text
    assert "perplexity" not in text


def test_card_has_the_settings_of_the_last_start_of_training(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    record_recipe(tiny_recipe(recipe.storage, training={"precision": "bf16"}))
    write_card(export_folder(recipe), recipe, dataset, METADATA)
    assert "  precision: bf16\n" in (export_folder(recipe) / "README.md").read_text()


def test_card_names_no_folder_of_the_machine(recipe: Recipe, dataset: TokenDataset) -> None:
    local = tiny_recipe(recipe.storage, evaluation={"data": "/home/alice/tasks"})
    write_card(export_folder(local), local, dataset, METADATA)
    text = (export_folder(local) / "README.md").read_text()
    assert "/home/alice" not in text
    assert str(recipe.storage) not in text


def test_a_card_that_was_edited_takes_scores_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nhand-written\n")
    for loss in (9.5, 8.5):
        add_scores(tmp_path, scores(loss))
    text = (tmp_path / "README.md").read_text()
    assert "hand-written" in text
    assert text.count("| perplexity |") == 1


def test_scores_are_inserted_and_replace_older_ones(recipe: Recipe, dataset: TokenDataset) -> None:
    folder = export_folder(recipe)
    write_card(folder, recipe, dataset, METADATA)
    without_scores = (folder / "README.md").read_text()
    for loss in (9.5, 8.5):
        add_scores(folder, scores(loss))
    text = (folder / "README.md").read_text()
    assert "| perplexity | 8.5000 | 0.2500 |" in text
    assert "9.5" not in text
    assert set(without_scores.splitlines()) < set(text.splitlines()), "something else was lost"


def test_repeated_export_keeps_the_scores_of_the_card(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    folder = export_folder(recipe)
    write_card(folder, recipe, dataset, METADATA)
    add_scores(folder, scores(8.5))
    before = (folder / "README.md").stat().st_mtime_ns
    save_scores(recipe, dataset, scores(8.5))
    write_card(folder, recipe, dataset, METADATA)
    assert (folder / "README.md").stat().st_mtime_ns == before


def test_scores_do_not_create_a_missing_card(tmp_path: Path) -> None:
    add_scores(tmp_path, scores(8.5))
    assert list(tmp_path.iterdir()) == []


def test_examples_are_for_the_server_and_not_in_the_card(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    """They are text of the corpus, and the card may be published."""
    folder = export_folder(recipe)
    write_card(folder, recipe, dataset, METADATA)
    assert read_examples(folder) == ()
    for word in (" grey", " calm"):
        examples = (Example("The sea was", ", and so was he.", word), Example("Once", "", word))
        add_scores(folder, replace(scores(9.5), examples=examples))

    assert "The sea was" not in (folder / "README.md").read_text()
    assert read_examples(folder) == examples

    (folder / "examples.json").write_text('[{"left": 1}]')
    with pytest.raises(CheckpointError, match=r"examples\.json cannot be read .*: remove it"):
        read_examples(folder)


def test_an_export_that_is_written_again_has_the_stored_examples(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    examples = (Example("Once", "", " upon"),)
    save_scores(recipe, dataset, replace(scores(9.5), examples=examples))

    write_card(export_folder(recipe), recipe, dataset, METADATA)

    assert read_examples(export_folder(recipe)) == examples
