"""Stored scores are used only for the same export, text and settings."""

import json
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError
from ul2r.evaluation.scores import InfilledText, Score, Scores
from ul2r.evaluation.stored_scores import load_scores, save_scores
from ul2r.model.export_examples import Example

SCORES = Scores(
    {"infill_loss": Score(1 / 3, 0.1, 7), "causal_loss": Score(2.0, 0.2, 8)},
    (InfilledText("a\n", "b", " c", "B", 1 / 3),),
    (Example("The sea", " was he.", " was calm, and so"),),
)


def test_stored_scores_are_those_of_this_export_and_these_settings(
    dataset: TokenDataset, recipe: Recipe
) -> None:
    assert load_scores(recipe, dataset) is None
    assert save_scores(recipe, dataset, SCORES) == recipe.paths.folder / "evaluation.json"
    assert load_scores(recipe, dataset) == SCORES

    fewer_rows = recipe.evaluation.model_copy(update={"num_rows": 5})
    assert load_scores(recipe.model_copy(update={"evaluation": fewer_rows}), dataset) is None

    metadata = recipe.paths.export / "ul2r.json"
    text = metadata.read_text()
    metadata.write_text(text.replace('"step": 3', '"step": 4'))
    assert metadata.read_text() != text
    assert load_scores(recipe, dataset) is None
    metadata.write_text(text)
    assert load_scores(recipe, dataset) == SCORES


def test_scores_of_an_older_format_are_measured_again(
    dataset: TokenDataset, recipe: Recipe
) -> None:
    path = save_scores(recipe, dataset, SCORES)
    stored = json.loads(path.read_text())
    # Format 1 called the standard error `error`.
    old_scores = {"infill_loss": {"mean": 1 / 3, "error": 0.1, "count": 7}}
    path.write_text(json.dumps(stored | {"format": 1, "scores": old_scores}))

    assert load_scores(recipe, dataset) is None


def test_a_run_without_an_export_says_what_to_run(
    dataset: TokenDataset, recipe: Recipe, tmp_path: Path
) -> None:
    other = recipe.model_copy(update={"name": "other"})

    message = r"has no export at .*: run `ul2r export RECIPE` first"
    with pytest.raises(CheckpointError, match=message):
        load_scores(other, dataset)


def test_an_export_with_another_tokenizer_is_refused(dataset: TokenDataset, recipe: Recipe) -> None:
    tokenizer = recipe.paths.export / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content + b"\n")
    try:
        with pytest.raises(CheckpointError, match="is not the tokenizer of"):
            load_scores(recipe, dataset)
    finally:
        tokenizer.write_bytes(content)
