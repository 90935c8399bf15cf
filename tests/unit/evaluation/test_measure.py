"""Every metric against an independent slow computation, example by example, without batches or caches."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from ul2r.config import Causal, Pairs, Recipe
from ul2r.data.prepare.pairs import prepare_pairs
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.sampling.held_out_windows import select_windows
from ul2r.data.store.dataset import TokenDataset, open_run_dataset
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.evaluation import evaluate, list_metrics
from ul2r.evaluation.infilling import InfillExamples, measure_infill_loss, measure_infill_match
from ul2r.evaluation.losses import (
    measure_causal_loss,
    measure_denoiser_loss,
    measure_denoiser_losses,
    measure_second_half_loss,
)
from ul2r.evaluation.scores import InfilledText
from ul2r.inference import LanguageModel, infill
from ul2r.objective import Batch
from ul2r.testing.pairs import write_pairs


@pytest.fixture(params=["ul2r_model", "causal_model", "causal_ul2r_model"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """An arm with modes and bidirectional prompts, one with neither, and one with modes only."""
    model: LanguageModel = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def examples(dataset: TokenDataset, recipe: Recipe) -> InfillExamples:
    return InfillExamples.build(dataset, recipe.evaluation)


def log_probabilities(model: LanguageModel, tokens: list[int], prefix: int) -> torch.Tensor:
    """Return log probabilities (S, V) after each token; the first `prefix` tokens attend to each other."""
    size = len(tokens)
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            mask[0, 0, query, key] = key <= query or (query < prefix and key < prefix)
    with torch.inference_mode():
        logits = model.network(torch.tensor([tokens]), attention_mask=mask).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def target_losses(
    model: LanguageModel, inputs: list[int], targets: list[int], *, bidirectional: bool
) -> list[float]:
    """Return nats of each target after the inputs and the targets before it."""
    prefix = len(inputs) if bidirectional else 0
    log_probs = log_probabilities(model, inputs + targets, prefix)
    return [-float(log_probs[len(inputs) + i - 1, target]) for i, target in enumerate(targets)]


def test_a_uniform_model_has_the_loss_of_a_uniform_guess_everywhere(
    uniform_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    scores = evaluate(uniform_model, dataset, recipe)

    assert list(scores.values) == [metric.name for metric in list_metrics(recipe.evaluation)]
    for name, score in scores.values.items():
        if name.endswith("loss") or name.startswith("denoiser_"):
            assert score.mean == pytest.approx(math.log(dataset.vocabulary.size), abs=1e-5), name
            assert score.stderr == pytest.approx(0.0, abs=1e-5), name
    assert scores["causal_perplexity"].mean == pytest.approx(dataset.vocabulary.size, rel=1e-5)


def test_every_arm_reads_plain_text_causally(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    windows = causal_windows(dataset, recipe)
    expected = [
        loss
        for window in windows
        for loss in target_losses(model, window[:1], window[1:], bidirectional=False)
    ]

    score = measure_causal_loss(model, dataset, recipe)

    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert score.count == len(windows) == 6


def causal_windows(dataset: TokenDataset, recipe: Recipe) -> list[list[int]]:
    """Return the text of the held-out rows: their tokens and the last label."""
    batch = BatchBuilder(recipe, dataset).build_held_out(Causal(), recipe.evaluation.num_rows)
    return [
        [*tokens, labels[-1]]
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
    ]


def test_second_half_loss_scores_the_same_text_for_each_arm_in_its_own_way(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    eos = dataset.vocabulary.eos
    length = 63  # [S2S], text and eos are 65 tokens, which take 64 positions

    expected = []
    for window in select_windows(dataset.held_out, 6, length).tolist():
        first, second = window[:31], window[31:]
        if model.metadata.denoising:
            first = [*dataset.vocabulary.modes["S2S"], *first]
        losses = target_losses(model, first, second, bidirectional=model.attention == "prefix")
        expected += [loss for loss, token in zip(losses, second, strict=True) if token != eos]

    assert len(expected) < 6 * 32, "at least one window must cross the end of a document"
    score = measure_second_half_loss(model, dataset, recipe)
    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)


def test_every_arm_gets_the_same_denoiser_rows(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    for denoiser in recipe.evaluation.mixture:
        batch = BatchBuilder(recipe, dataset).build_held_out(denoiser, recipe.evaluation.num_rows)
        expected = []
        for row in range(len(batch)):
            scored = np.flatnonzero(batch.loss_mask[row])
            num_inputs = int(scored[0]) + 1
            tokens = [
                *batch.tokens[row, : scored[-1] + 1].tolist(),
                int(batch.labels[row, scored[-1]]),
            ]
            expected += target_losses(
                model, tokens[:num_inputs], tokens[num_inputs:], bidirectional=True
            )

        scores = measure_denoiser_losses(model, dataset, recipe, denoiser)

        assert scores["all"].mean == pytest.approx(np.mean(expected), abs=1e-5), denoiser.name
        labels = [label for row in range(len(batch)) for label in scored_labels(batch, row)]
        sentinels = set(dataset.vocabulary.sentinels)
        if not sentinels.intersection(labels):
            assert scores.keys() == {"all"}
            continue
        pairs = list(zip(labels, expected, strict=True))
        text = [loss for label, loss in pairs if label not in {*sentinels, dataset.vocabulary.eos}]
        format_ = [loss for label, loss in pairs if label in sentinels]
        assert scores["text"].mean == pytest.approx(np.mean(text), abs=1e-5), denoiser.name
        assert scores["sentinel"].mean == pytest.approx(np.mean(format_), abs=1e-5), denoiser.name


def scored_labels(batch: Batch, row: int) -> list[int]:
    """Return the targets of a row."""
    labels: list[int] = batch.labels[row, batch.loss_mask[row] == 1].tolist()
    return labels


def test_pairs_are_measured_by_their_answers(
    model: LanguageModel, recipe: Recipe, tmp_path: Path
) -> None:
    """Each pair alone gives the same losses as in a row with others."""
    pairs = [str(write_pairs(tmp_path / "pairs.jsonl", 300))]
    tree = recipe.model_dump()
    tree["data"]["pairs"] = pairs
    tree["objective"]["sequence_length"] = 128
    with_pairs = Recipe.model_validate(tree)
    prepare_pairs(with_pairs)
    dataset = open_run_dataset(with_pairs)
    (denoiser,) = [d for d in with_pairs.evaluation.mixture if isinstance(d, Pairs)]
    builder = BatchBuilder(with_pairs, dataset)
    num_rows = min(6, builder.num_held_out_rows(denoiser))
    batch = builder.build_held_out(denoiser, num_rows)

    assert dataset.pairs is not None
    store = dataset.pairs.held_out
    shown = {tuple(store.read(n)): length for n, length in enumerate(store.prompt_lengths.tolist())}
    mode = list(dataset.vocabulary.modes["S2S"])
    expected = []
    for row in range(num_rows):
        starts = np.flatnonzero(
            (batch.position_ids[row] == 0) & (batch.denoiser_ids[row] >= 0)
        ).tolist()
        for start in starts:
            text = batch.tokens[row, start + 1 :].tolist()
            (pair,) = [pair for pair in shown if text[: len(pair)] == list(pair)]
            prompt = list(pair[: shown[pair]])
            answer = [*pair[shown[pair] :], dataset.vocabulary.eos]
            expected += target_losses(model, mode + prompt, answer, bidirectional=True)

    assert len(expected) == batch.loss_mask.sum()
    score = measure_denoiser_loss(model, dataset, with_pairs, denoiser)
    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert score.count == num_rows
    assert "denoiser_loss/pairs" in [m.name for m in list_metrics(with_pairs.evaluation)]


def test_infill_loss_counts_only_the_span(
    model: LanguageModel, dataset: TokenDataset, examples: InfillExamples
) -> None:
    modes = dataset.vocabulary.modes
    sentinels = dataset.vocabulary.sentinels

    expected = []
    for left, span, right in contexts_and_spans(examples):
        if not model.metadata.denoising:
            expected += target_losses(model, left, span, bidirectional=False)
        else:
            inputs = [*modes["NLU"], *left, sentinels[0], *right, sentinels[1]]
            bidirectional = model.attention == "prefix"
            targets = [sentinels[0], *span]
            expected += target_losses(model, inputs, targets, bidirectional=bidirectional)[1:]

    assert len(expected) == examples.span.size
    score = measure_infill_loss(model, examples, dataset.vocabulary)
    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)


def contexts_and_spans(
    examples: InfillExamples,
) -> list[tuple[list[int], list[int], list[int]]]:
    return list(
        zip(examples.left.tolist(), examples.span.tolist(), examples.right.tolist(), strict=True)
    )


def test_long_spans_get_the_mode_of_long_spans(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    modes = dataset.vocabulary.modes
    sentinels = dataset.vocabulary.sentinels
    long_spans = recipe.evaluation.model_copy(update={"infill_span_length": 12})
    examples = InfillExamples.build(dataset, long_spans)

    expected = []
    for left, span, right in contexts_and_spans(examples):
        inputs = [*modes["NLG"], *left, sentinels[0], *right, sentinels[1]]
        targets = [sentinels[0], *span]
        expected += target_losses(ul2r_model, inputs, targets, bidirectional=True)[1:]

    score = measure_infill_loss(ul2r_model, examples, dataset.vocabulary)
    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)


def infill_greedily(
    model: LanguageModel, dataset: TokenDataset, left: list[int], right: list[int]
) -> str:
    """Return the text that an arm generates for a span of three tokens, recomputing everything at each token."""
    modes = dataset.vocabulary.modes
    sentinels = dataset.vocabulary.sentinels
    inputs = left
    limit = 3
    tokens = list(inputs)
    if model.metadata.denoising:
        inputs = [*modes["NLU"], *left, sentinels[0], *right, sentinels[1]]
        limit = 6
        tokens = [*inputs, sentinels[0]]
    prefix = len(inputs) if model.attention == "prefix" else 0

    generated: list[int] = []
    while len(generated) < limit:
        log_probs = log_probabilities(model, tokens, prefix)[-1]
        allowed = model.is_text.clone()
        allowed[sentinels[1]] = model.metadata.denoising and bool(generated)
        token = int(log_probs.masked_fill(~allowed, -torch.inf).argmax())
        if token == sentinels[1]:
            break
        generated.append(token)
        tokens.append(token)
    return model.decode(generated)


def test_infilled_text_is_the_most_likely_one(
    model: LanguageModel, dataset: TokenDataset, examples: InfillExamples
) -> None:
    pairs = [
        (infill_greedily(model, dataset, left, right), model.decode(span))
        for left, span, right in contexts_and_spans(examples)
    ]

    kept: list[InfilledText] = []
    exact_match, edit_similarity = measure_infill_match(model, examples, dataset.vocabulary, kept)

    assert [(text.answer, text.target) for text in kept] == pairs
    whole = np.concatenate((examples.left[0], examples.span[0], examples.right[0]))
    assert kept[0].left + kept[0].target + kept[0].right == model.decode(whole.tolist())
    assert np.mean([text.edit_similarity for text in kept]) == pytest.approx(edit_similarity.mean)
    assert exact_match.mean == np.mean([text == truth for text, truth in pairs])
    expected = [
        1 - Levenshtein.distance(text, truth) / max(len(text), len(truth)) for text, truth in pairs
    ]
    assert edit_similarity.mean == pytest.approx(np.mean(expected))
    assert exact_match.count == edit_similarity.count == len(examples.span)


def test_an_arm_that_generates_the_span_matches_it_exactly(
    causal_model: LanguageModel, dataset: TokenDataset, examples: InfillExamples
) -> None:
    """In all examples but the first, the true span is replaced by what the arm generates."""
    spans = examples.span.copy()
    for row, left in enumerate(examples.left[1:].tolist(), start=1):
        tokens = list(left)
        for i in range(3):
            log_probs = log_probabilities(causal_model, tokens, 0)[-1]
            tokens.append(int(log_probs.masked_fill(~causal_model.is_text, -torch.inf).argmax()))
            spans[row, i] = tokens[-1]

    exact_match, edit_similarity = measure_infill_match(
        causal_model, replace(examples, span=spans), dataset.vocabulary
    )

    assert exact_match.mean == pytest.approx(1 - 1 / len(spans))
    assert edit_similarity.mean >= exact_match.mean


def test_only_ul2r_arms_read_the_right_context(
    causal_model: LanguageModel,
    ul2r_model: LanguageModel,
    dataset: TokenDataset,
    examples: InfillExamples,
) -> None:
    changed = replace(examples, right=examples.right[::-1].copy())

    for model, reads_right in ((causal_model, False), (ul2r_model, True)):
        before = measure_infill_loss(model, examples, dataset.vocabulary)
        after = measure_infill_loss(model, changed, dataset.vocabulary)
        assert (before != after) == reads_right


def test_a_ul2r_arm_is_measured_as_it_is_served(
    ul2r_model: LanguageModel, dataset: TokenDataset, examples: InfillExamples
) -> None:
    """Contexts whose tokens survive decoding and encoding can also be given to `infill` as text."""
    num_compared = 0
    for row, (left, span, right) in enumerate(contexts_and_spans(examples)):
        parts = [ul2r_model.decode(left), ul2r_model.decode(right)]
        if [ul2r_model.encode(part) for part in parts] != [left, right]:
            continue
        num_compared += 1

        fill = infill(ul2r_model, parts, mode="NLU", max_tokens=6).fills[0]
        expected = Levenshtein.normalized_similarity(fill, ul2r_model.decode(span))

        # Twice, since a standard error needs two examples.
        arrays = (examples.left, examples.span, examples.right)
        twice = InfillExamples(*(np.repeat(array[row : row + 1], 2, 0) for array in arrays))
        _, edit_similarity = measure_infill_match(ul2r_model, twice, dataset.vocabulary)
        assert edit_similarity.mean == pytest.approx(expected)
    assert num_compared


def test_settings_that_do_not_fit_are_refused(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    too_wide = recipe.evaluation.model_copy(update={"infill_context_length": 30})
    with pytest.raises(
        RecipeError, match="infill_context_length=30 on both sides of infill_span_length=3 makes 67"
    ):
        evaluate(ul2r_model, dataset, recipe.model_copy(update={"evaluation": too_wide}))

    causal = {"mixture": (Causal(),)}
    too_long = {
        "objective": recipe.objective.model_copy(update={"sequence_length": 2048, **causal}),
        "evaluation": recipe.evaluation.model_copy(update=causal),
    }
    with pytest.raises(CorpusError, match="has 1 rows of 2048 tokens, but at least 2 are needed"):
        evaluate(ul2r_model, dataset, recipe.model_copy(update=too_long))


def test_a_model_with_another_vocabulary_is_refused(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    other = replace(dataset.vocabulary, size=dataset.vocabulary.size + 1)

    with pytest.raises(CheckpointError, match="another vocabulary"):
        evaluate(ul2r_model, replace(dataset, vocabulary=other), recipe)


def test_fim_is_measured_in_its_own_layout(
    causal_model: LanguageModel, dataset: TokenDataset, recipe: Recipe, examples: InfillExamples
) -> None:
    first, second, third = dataset.vocabulary.sentinels[:3]
    expected = []
    for left, span, right in contexts_and_spans(examples):
        inputs = [first, *left, second, *right]
        losses = target_losses(causal_model, inputs, [third, *span], bidirectional=False)
        expected += losses[1:]

    metadata = replace(causal_model.metadata, fim=True)
    fim = LanguageModel(
        causal_model.network, causal_model.tokenizer, metadata, causal_model.eos_token_ids
    )
    assert evaluate(fim, dataset, recipe)["infill_loss"].mean == pytest.approx(
        np.mean(expected), abs=1e-5
    )
