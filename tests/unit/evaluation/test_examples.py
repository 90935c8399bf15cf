"""Examples are held-out texts with the answers that are served, the best first."""

from __future__ import annotations

from ul2r.config import Recipe
from ul2r.data.store.dataset import TokenDataset
from ul2r.evaluation.examples import NUM_EXAMPLES, Candidate, choose_best, choose_examples
from ul2r.inference import LanguageModel, complete, infill


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


def test_the_best_are_the_most_alike_and_of_those_the_longest() -> None:
    answered = [
        (Candidate("a", " sea", ""), " sky"),
        (Candidate("b", " sea", ""), " sea"),
        (Candidate("c", " calm sea", ""), " calm sea"),
        (Candidate("d", " sea", ""), " xyz"),
        (Candidate("e", " sea", ""), " see"),
    ]

    assert [candidate.left for candidate, _ in choose_best(answered)] == ["c", "b", "e"]
