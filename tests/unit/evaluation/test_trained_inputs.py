"""What an arm reads in evaluation that was trained with an eos after inputs, a sentinel in prefixes, or on FIM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ul2r.config import Recipe
from ul2r.data.sampling.held_out_windows import select_windows
from ul2r.data.store.dataset import TokenDataset
from ul2r.data.tokenizer import add_special_tokens
from ul2r.errors import RecipeError
from ul2r.evaluation import evaluate
from ul2r.evaluation.fim_infilling import measure_fim_loss, measure_fim_match
from ul2r.evaluation.infilling import InfillExamples, build_infill_prompts, measure_infill_match
from ul2r.evaluation.losses import measure_second_half_loss
from ul2r.evaluation.scores import InfilledText
from ul2r.inference import LanguageModel
from ul2r.objective import Batch
from ul2r.testing.models import ScriptedModel, write_tiny_export
from ul2r.testing.tokenizers import KINDS, SPACE


class RecordingModel(LanguageModel):
    """Model that records the batches that it scores; every token has a loss of 1."""

    batches: list[Batch]

    def token_losses(self, batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        self.batches.append(batch)
        return np.ones(batch.tokens.shape, np.float32)


@pytest.fixture(params=[(False, False), (True, False), (False, True), (True, True)])
def model(request: pytest.FixtureRequest, ul2r_model: LanguageModel) -> RecordingModel:
    """The exported model, as if it had been trained with an eos after inputs, and with a sentinel in prefixes."""
    eos_after_inputs, prefix_sentinel = request.param
    metadata = replace(
        ul2r_model.metadata, eos_after_inputs=eos_after_inputs, prefix_sentinel=prefix_sentinel
    )
    model = RecordingModel(
        ul2r_model.network, ul2r_model.tokenizer, metadata, ul2r_model.eos_token_ids
    )
    model.batches = []
    return model


def test_the_second_half_is_scored_behind_the_inputs_of_training(
    model: RecordingModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    eos = dataset.vocabulary.eos
    sentinel = list(dataset.vocabulary.sentinels[: int(model.metadata.prefix_sentinel)])
    end = [eos] * model.metadata.eos_after_inputs
    num_special = 2 * len(sentinel) + len(end)

    measure_second_half_loss(model, dataset, recipe)

    (batch,) = model.batches
    # The longest text of a causal arm and of one without these settings; the same second half for all.
    for row, window in enumerate(select_windows(dataset.held_out, 6, 63).tolist()):
        first, second = window[num_special:31], window[31:]
        inputs = [*dataset.vocabulary.modes["S2S"], *first, *sentinel, *end]
        expected = [*inputs, *sentinel, *second]
        assert [*batch.tokens[row].tolist(), batch.labels[row, -1]] == expected
        scored = [0] * (len(inputs) + len(sentinel) - 1) + [int(token != eos) for token in second]
        assert batch.loss_mask[row].tolist() == scored
        assert batch.kv_end[row, 0] == len(inputs)
    assert batch.tokens.shape[1] <= recipe.objective.sequence_length


def test_infilling_reads_the_inputs_of_training(
    model: RecordingModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    examples = InfillExamples.build(dataset, recipe.evaluation)
    first, second = dataset.vocabulary.sentinels[:2]
    end = [dataset.vocabulary.eos] * model.metadata.eos_after_inputs

    prompts = build_infill_prompts(model, examples, dataset.vocabulary)

    rows = zip(prompts.tolist(), examples.left.tolist(), examples.right.tolist(), strict=True)
    for prompt, left, right in rows:
        assert prompt == [*dataset.vocabulary.modes["NLU"], *left, first, *right, second, *end]


def test_a_trained_eos_counts_in_the_length_of_an_infilling(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    # 2 x 29 tokens of context, 3 of the span, 3 sentinels and a mode are the 65 tokens of a slot.
    evaluation = recipe.evaluation.model_copy(update={"infill_context_length": 29})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    metadata = replace(ul2r_model.metadata, eos_after_inputs=True)
    model = LanguageModel(
        ul2r_model.network, ul2r_model.tokenizer, metadata, ul2r_model.eos_token_ids
    )

    with pytest.raises(RecipeError, match="makes 66 tokens, but a slot has 65"):
        evaluate(model, dataset, recipe)


def test_spans_are_compared_as_text_behind_their_left_side(tmp_path: Path) -> None:
    """At the beginning of a text Llama 2's decoder drops a space: there " s" and "s" would be equal."""
    tokenizer = KINDS["Llama 2"]()
    add_special_tokens(tokenizer, num_sentinels=3)
    real = LanguageModel.load(write_tiny_export(tmp_path / "export", tokenizer=tokenizer))
    assert real.vocabulary is not None
    first, second = real.vocabulary.sentinels[:2]
    left = real.encode("The river")
    (without_space,) = real.encode_continuation("s")
    with_space = tokenizer.token_to_id(f"{SPACE}s")
    assert with_space is not None
    assert real.decode([with_space]) == real.decode([without_space])

    examples = InfillExamples(*(np.array([ids] * 2) for ids in (left, [with_space], left)))
    for token, matches in ((with_space, 1.0), (without_space, 0.0)):
        scripted = ScriptedModel(real, {first: [token], token: [second]}, fallback=token)
        exact_match, _ = measure_infill_match(scripted, examples, real.vocabulary)
        assert exact_match.mean == matches


def test_fim_reads_both_sides_and_ends_its_span_itself(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    examples = InfillExamples.build(dataset, recipe.evaluation)
    first, second, third = dataset.vocabulary.sentinels[:3]
    span = examples.span[0].tolist()
    # Written so in training: tests/unit/objective compares the rows of the denoiser with the reference.
    prompt = [first, *examples.left[0].tolist(), second, *examples.right[0].tolist()]
    model = RecordingModel(
        ul2r_model.network, ul2r_model.tokenizer, ul2r_model.metadata, ul2r_model.eos_token_ids
    )
    model.batches = []

    loss = measure_fim_loss(model, examples, dataset.vocabulary)

    (batch,) = model.batches
    assert [*batch.tokens[0].tolist(), batch.labels[0, -1]] == [*prompt, third, *span]
    assert batch.labels[0, batch.loss_mask[0] == 1].tolist() == span
    assert (batch.kv_end == batch.position_ids + 1).all()
    assert loss.count == recipe.evaluation.num_infill_examples

    # One example in which each token of the span follows the one before, and eos the last.
    chain = dict(zip([third, *span], [*span, dataset.vocabulary.eos], strict=True))
    twice = InfillExamples(
        *(part[[0, 0]] for part in (examples.left, examples.span, examples.right))
    )
    scripted = ScriptedModel(ul2r_model, {t: [n] for t, n in chain.items()}, fallback=span[0])
    kept: list[InfilledText] = []
    exact_match, similarity = measure_fim_match(scripted, twice, dataset.vocabulary, kept)
    assert [text.answer for text in kept] == [text.target for text in kept]
    assert (exact_match.mean, similarity.mean) == (1, 1)
    assert scripted.calls[0] == prompt
    assert not any(scripted.bidirectional_calls)
