"""Files of an export that say how to use it: chat templates kept, generation settings, an older export completed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.inference import read_export_metadata
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export
from ul2r.testing.recipes import tiny_recipe
from ul2r.workflows.export_files import write_export_files

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("files")
    recipe = tiny_recipe(folder)
    export = write_tiny_export(recipe.paths.export)
    make_tiny_store(recipe.storage_paths.store, tokenizer=export / "tokenizer.json")
    return recipe


@pytest.fixture(scope="module")
def dataset(recipe: Recipe) -> TokenDataset:
    from ul2r.data.store.dataset import open_dataset

    return open_dataset(recipe.storage_paths.store)


def write_files(recipe: Recipe, dataset: TokenDataset, base: Path | None = None) -> Path:
    folder = recipe.paths.export
    if base is not None:
        data = recipe.data.model_copy(update={"tokenizer": base / "tokenizer.json"})
        recipe = recipe.model_copy(update={"data": data})
    write_export_files(folder, recipe, dataset, read_export_metadata(folder))
    return folder


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_older_export_gets_the_files_and_keeps_its_weights(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    folder = recipe.paths.export
    before = modification_times(folder)

    write_files(recipe, dataset)

    kept = {name: folder / name for name in ("model.safetensors", "ul2r.json", "tokenizer.json")}
    after = modification_times(folder)
    assert all(before[path] == after[path] for path in kept.values())
    names = {path.name for path in (folder / "custom_generate").iterdir()}
    assert names == {"encode.py", "generate.py", "prefix_mask.py", "settings.py", "slots.py"}
    assert "ul2r.model" not in (folder / "custom_generate/generate.py").read_text()

    # A module of another version goes, and nothing else is written again.
    (folder / "custom_generate/older.py").touch()
    write_files(recipe, dataset)
    assert modification_times(folder) == after


def test_modes_sentinels_and_padding_are_suppressed_and_eos_is_not(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    folder = write_files(recipe, dataset)
    vocabulary = dataset.vocabulary
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]

    settings = GenerationConfig.from_pretrained(folder)

    special = {*vocabulary.non_text_ids, *range(vocabulary.size, rows)}
    assert set(settings.suppress_tokens) == special
    assert settings.eos_token_id == settings.pad_token_id == vocabulary.eos


@pytest.mark.parametrize("form", ["file", "key", "list"])
def test_templates_of_the_base_are_kept(
    recipe: Recipe, dataset: TokenDataset, tmp_path: Path, form: str
) -> None:
    named = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tools", "template": "tools {{ messages[0].content }}"},
    ]
    keys: dict[str, dict[str, object]] = {
        "file": {},
        "key": {"chat_template": TEMPLATE},
        "list": {"chat_template": named},
    }
    # One token of the tokenizer, and one that it lacks.
    tokens = {"bos_token": {"content": "a"}, "unk_token": "<lacking>"}
    config = {**keys[form], **tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)

    folder = write_files(recipe, dataset, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert written == "auser: Hello\n"
    assert len(tokenizer) == dataset.vocabulary.size
    # Training rows have no bos.
    assert tokenizer("b").input_ids == tokenizer.convert_tokens_to_ids(["b"])
    if form == "list":
        other = tokenizer.apply_chat_template(MESSAGES, chat_template="tools", tokenize=False)
        assert other == "tools Hello"


def test_run_that_continues_a_run_has_the_templates_of_its_export(
    recipe: Recipe, dataset: TokenDataset
) -> None:
    parent = recipe.storage_paths.run("parent").export
    parent.mkdir(parents=True)
    (parent / "chat_template.jinja").write_text("parent's")

    folder = write_files(recipe.model_copy(update={"base": "parent"}), dataset)

    assert (folder / "chat_template.jinja").read_text() == "parent's"
    shutil.rmtree(parent)
