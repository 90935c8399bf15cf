"""Recipes that `ul2r new` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ul2r.config import Comparison, HuggingFaceBase, Recipe, load
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.launch.pretrained import fill_model_from_base
from ul2r.testing.families import write_random_model
from ul2r.testing.tokenizers import make_llama_3
from ul2r.workflows.new import write_project

LINE = "def area(width, height):\n    return width * height\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "My Model"
    write_random_model("Llama 3.2", folder)
    make_llama_3().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.py").write_text(LINE * 20_000)
    return folder


def test_written_recipes_load_and_belong_together(model: Path, text: Path, tmp_path: Path) -> None:
    project = write_project(str(model), [str(text)], tmp_path / "out", steps=7)
    base = HuggingFaceBase(hf=str(model))
    runs = {
        role: load(project.recipe(role), (), Recipe, fill_model_from_base)
        for role in ("ul2r", "control", "fim")
    }
    for role, recipe in runs.items():
        assert (recipe.role, recipe.base, recipe.training.steps) == (role, base, 7)
        assert recipe.data.corpus == (str(text),)
        assert recipe.storage == project.storage
        assert recipe.training.new_embeddings == "rare_subwords"
        assert recipe.optimizer.special_token_lr_factor == 5
    assert runs["ul2r"].name == "my-model-ul2r"
    assert [denoiser.name for denoiser in runs["control"].objective.mixture] == ["causal"]
    assert runs["fim"].objective.has_fim
    own = {"name", "role", "objective", "export"}
    shared = [recipe.model_dump(exclude=own) for recipe in runs.values()]
    assert shared == shared[:1] * 3

    comparison = load(project.comparison, (), Comparison, fill_model_from_base)
    assert next(iter(comparison.recipes.values())) == base
    assert comparison.tracking.experiment == runs["ul2r"].tracking.experiment
    assert list(comparison.recipes) == ["base", "control", "ul2r"]

    # FIM's line is there to be taken in.
    file = project.comparison
    file.write_text(file.read_text().replace("# fim: ", "fim: "))
    assert load(file, (), Comparison, fill_model_from_base).recipes["fim"] == project.recipe("fim")


def test_recipes_that_were_edited_are_kept(model: Path, text: Path, tmp_path: Path) -> None:
    project = write_project(str(model), [str(text)], tmp_path / "out", steps=7)
    settings = project.folder / "settings.yaml"
    settings.write_text(settings.read_text().replace("steps: 7", "steps: 8"))
    again = write_project(str(model), [str(text)], tmp_path / "out")
    assert again.settings is None
    assert write_project(str(model), [str(text)], tmp_path / "out", steps=8).settings is None
    assert load(again.recipe("ul2r"), (), Recipe, fill_model_from_base).training.steps == 8


def test_a_folder_of_another_model_or_text_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    write_project(str(model), [str(text)], tmp_path / "out", steps=7)
    with pytest.raises(RecipeError, match=r"holds recipes for base=.*give another folder"):
        write_project(str(model), ["stdlib"], tmp_path / "out")
    with pytest.raises(RecipeError, match=r"change training\.steps in .*settings\.yaml"):
        write_project(str(model), [str(text)], tmp_path / "out", steps=9)


def test_a_model_named_by_a_number_has_recipes_that_load(
    model: Path, text: Path, tmp_path: Path
) -> None:
    numbered = model.rename(tmp_path / "1.5")
    project = write_project(str(numbered), [str(text)], tmp_path / "out", steps=7)
    recipe = load(project.recipe("ul2r"), (), Recipe, fill_model_from_base)
    assert recipe.tracking.experiment == "1.5"


@pytest.mark.parametrize("name", ["_x", "m\N{ROCKET}", "m" * 200, 'a "b": #c'])
def test_a_model_of_any_name_has_recipes_that_load(
    model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    renamed = model.rename(tmp_path / name)
    odd = text.rename(tmp_path / f"text of {name[:9]}")
    project = write_project(str(renamed), [str(odd)], tmp_path / "out", steps=7)
    recipe = load(project.recipe("ul2r"), (), Recipe, fill_model_from_base)
    assert recipe.base == HuggingFaceBase(hf=str(renamed))
    assert write_project(str(renamed), [str(odd)], tmp_path / "out").settings is None


def test_files_of_others_are_not_replaced(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "compare.yaml").write_text("name: mine\n")
    with pytest.raises(RecipeError, match=r"compare\.yaml exists and would be replaced"):
        write_project(str(model), [str(text)], out, steps=7)
    assert [path.name for path in out.iterdir()] == ["compare.yaml"]
    assert (out / "compare.yaml").read_text() == "name: mine\n"


def test_recipes_that_cannot_be_loaded_are_not_left_behind(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError):
        write_project(str(model), [str(text)], tmp_path / "out", steps=10**30)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", ["- a\n", "data: x\n", "a: [", "\udcff"])
def test_settings_that_were_edited_beyond_reading_are_refused(
    model: Path, text: Path, tmp_path: Path, content: str
) -> None:
    project = write_project(str(model), [str(text)], tmp_path / "out", steps=7)
    path = project.folder / "settings.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=r"settings\.yaml"):
        write_project(str(model), [str(text)], tmp_path / "out")


def test_words_that_are_empty_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    """As of a shell's variable that is not set."""
    with pytest.raises(RecipeError, match="MODEL is empty"):
        write_project("", [str(text)], tmp_path / "out")
    with pytest.raises(RecipeError, match="TEXT is empty"):
        write_project(str(model), [""], tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"the recipes cannot be written .*--folder"):
        write_project(str(model), [str(text)], tmp_path / "file/out", steps=7)


def test_an_infilling_example_fits_a_row(model: Path, text: Path, tmp_path: Path) -> None:
    """Rows of this model have 128 positions, fewer than the default context needs."""
    project = write_project(str(model), [str(text)], tmp_path / "out", steps=7)
    recipe = load(project.recipe("ul2r"), (), Recipe, fill_model_from_base)
    evaluation = recipe.evaluation
    length = 2 * evaluation.infill_context_length + 2 * evaluation.infill_span_length
    assert length < recipe.objective.sequence_length


def test_nothing_is_written_for_a_model_or_text_that_cannot_be_used(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"config\.json"):
        write_project(str(text), [str(text)], out)
    with pytest.raises(CorpusError):
        write_project(str(model), [str(tmp_path / "missing")], out)
    (text / "a.py").write_text(LINE)
    with pytest.raises(RecipeError, match="give more text"):
        write_project(str(model), [str(text)], out)
    assert not out.exists()


def test_a_text_that_is_missing_is_told_by_the_argument(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=rf"txet: no such file or folder; did you mean {text}\?$"):
        write_project(str(model), [str(tmp_path / "txet")], tmp_path / "out")
    with pytest.raises(CorpusError, match=r"no such file or folder: set TEXT to your text$"):
        write_project(str(model), [str(tmp_path / "else")], tmp_path / "out")
