"""Examples are held-out texts with the answers that are served, the best first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.examples import NUM_EXAMPLES, Candidate, choose_best, choose_examples
from ul2r.inference import LanguageModel, complete, infill
from ul2r.testing.corpus import make_tiny_store
from ul2r.testing.models import write_tiny_export


def test_answers_are_those_that_are_served(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    examples = choose_examples(ul2r_model, dataset, recipe.evaluation)

    held_out = ul2r_model.decode(dataset.held_out.read_tokens(0, len(dataset.held_out)).tolist())
    assert [bool(example.right) for example in examples] == [True] * 3 + [False] * 3
    for example in examples:
        assert example.left in held_out
        assert example.right in held_out
        if example.right:
            answer = infill(ul2r_model, [example.left, example.right]).fills[0]
        else:
            answer = complete(ul2r_model, example.left).text
        assert example.answer
        assert answer.startswith(example.answer)
    assert examples == choose_examples(ul2r_model, dataset, recipe.evaluation)


def test_a_causal_model_gets_continuations_only(
    causal_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    examples = choose_examples(causal_model, dataset, recipe.evaluation)

    assert [example.right for example in examples] == [""] * NUM_EXAMPLES


@pytest.mark.parametrize("max_positions", [24, 48, 64])
def test_a_model_of_short_rows_gets_shorter_texts_or_none(
    dataset: TokenDataset, recipe: Recipe, tmp_path: Path, max_positions: int
) -> None:
    """Its scores would otherwise be lost, since examples are the last thing that is made of a loaded model."""
    folder = write_tiny_export(tmp_path, num_sentinels=16, max_positions=max_positions)
    shutil.copy(dataset.tokenizer_file, folder)
    model = LanguageModel.load(folder)
    settings = recipe.evaluation.model_copy(
        update={"infill_context_length": max_positions // 2 - 4}
    )

    examples = choose_examples(model, dataset, settings)

    assert len(examples) == (0 if max_positions == 24 else 2 * NUM_EXAMPLES)


def test_held_out_text_of_too_short_documents_gives_no_examples(
    ul2r_model: LanguageModel, recipe: Recipe, tmp_path: Path
) -> None:
    """The metrics look for such texts in smaller parts, and may have found some."""
    dataset = make_tiny_store(
        tmp_path, num_documents=200, num_sentences=1, vocabulary_size=308, num_sentinels=16
    )

    assert choose_examples(ul2r_model, dataset, recipe.evaluation) == ()


def test_the_best_are_the_most_alike_and_of_those_the_longest() -> None:
    answered = [
        (Candidate("a", " sea", ""), " sky"),
        (Candidate("b", " sea", ""), " sea"),
        (Candidate("c", " calm sea", ""), " calm sea"),
        (Candidate("d", " sea", ""), " xyz"),
        (Candidate("e", " sea", ""), " see"),
    ]

    assert [candidate.left for candidate, _ in choose_best(answered)] == ["c", "b", "e"]
