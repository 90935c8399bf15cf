"""Every metric against a slow computation of its own, example by example and without rows or caches."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from ul2r.config import Causal, Recipe
from ul2r.data.sampling.batches import BatchBuilder
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import CheckpointError, CorpusError, RecipeError
from ul2r.evaluation import evaluate, list_metrics
from ul2r.evaluation.held_out_windows import select_windows
from ul2r.evaluation.infilling import InfillExamples, measure_infill_loss, measure_infill_match
from ul2r.evaluation.losses import (
    measure_causal_loss,
    measure_denoiser_loss,
    measure_second_half_loss,
)
from ul2r.evaluation.stored_scores import load_scores, save_scores
from ul2r.inference import LanguageModel, infill


@pytest.fixture(params=["ul2r_model", "causal_model", "causal_ul2r_model"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """An arm that knows modes and reads in both directions, one that does neither, and one with modes alone."""
    found: LanguageModel = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def gaps(dataset: TokenDataset, recipe: Recipe) -> InfillExamples:
    return InfillExamples.build(dataset, recipe.evaluation)


def log_chances(model: LanguageModel, tokens: list[int], inputs: int) -> torch.Tensor:
    """Log probabilities after each of `tokens`, (S, V), the first `inputs` of which see each other."""
    size = len(tokens)
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            mask[0, 0, query, key] = key <= query or (query < inputs and key < inputs)
    with torch.inference_mode():
        logits = model.network(torch.tensor([tokens]), attention_mask=mask).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def losses_of(
    model: LanguageModel, inputs: list[int], targets: list[int], *, bidirectional: bool
) -> list[float]:
    """Nats of each target after the inputs and the targets before it."""
    chances = log_chances(model, inputs + targets, len(inputs) if bidirectional else 0)
    return [
        -float(chances[len(inputs) + place - 1, target]) for place, target in enumerate(targets)
    ]


def test_a_model_without_an_opinion_has_the_loss_of_a_uniform_guess_everywhere(
    uniform_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    scores = evaluate(uniform_model, dataset, recipe)
    assert list(scores.values) == [metric.name for metric in list_metrics(recipe.evaluation)]
    for name, score in scores.values.items():
        if name.endswith("loss") or name.startswith("denoiser_loss/"):
            assert score.mean == pytest.approx(math.log(dataset.vocabulary.size), abs=1e-5), name
            assert score.stderr == pytest.approx(0.0, abs=1e-5), name
    assert scores["causal_perplexity"].mean == pytest.approx(dataset.vocabulary.size, rel=1e-5)


def test_plain_text_is_read_causally_by_every_arm(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    texts = causal_windows(dataset, recipe)
    losses = [
        loss for text in texts for loss in losses_of(model, text[:1], text[1:], bidirectional=False)
    ]
    score = measure_causal_loss(model, dataset, recipe)
    assert score.mean == pytest.approx(np.mean(losses), abs=1e-5)
    assert score.count == len(texts) == 6


def causal_windows(dataset: TokenDataset, recipe: Recipe) -> list[list[int]]:
    """The text of the held-out rows: tokens, and the last one's label."""
    rows = BatchBuilder(recipe, dataset).build_held_out(Causal(), recipe.evaluation.num_rows)
    return [
        [*tokens, labels[-1]]
        for tokens, labels in zip(rows.tokens.tolist(), rows.labels.tolist(), strict=True)
    ]


def test_second_half_loss_counts_the_same_text_for_each_arm_in_its_own_way(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    length = 63  # [S2S], text and eos make 65 tokens, which are 64 positions
    losses = []
    for text in select_windows(dataset.held_out, 6, length).tolist():
        first, second = text[:31], text[31:]
        if model.metadata.denoising:
            first = [*dataset.vocabulary.modes["S2S"], *first]
        each = losses_of(model, first, second, bidirectional=model.attention == "prefix")
        losses += [
            loss
            for loss, token in zip(each, second, strict=True)
            if token != dataset.vocabulary.eos
        ]
    assert len(losses) < 6 * 32  # one window at least crosses a document's end
    assert measure_second_half_loss(model, dataset, recipe).mean == pytest.approx(np.mean(losses), abs=1e-5)


def test_every_arm_is_given_the_same_denoiser_rows(
    model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    for denoiser in recipe.evaluation.mixture:
        rows = BatchBuilder(recipe, dataset).build_held_out(denoiser, recipe.evaluation.num_rows)
        losses = []
        for row in range(len(rows)):
            scored = np.flatnonzero(rows.loss_mask[row])
            inputs = int(scored[0]) + 1
            tokens = [
                *rows.tokens[row, : scored[-1] + 1].tolist(),
                int(rows.labels[row, scored[-1]]),
            ]
            losses += losses_of(model, tokens[:inputs], tokens[inputs:], bidirectional=True)
        score = measure_denoiser_loss(model, dataset, recipe, denoiser)
        assert score.mean == pytest.approx(np.mean(losses), abs=1e-5), denoiser.name


def test_infill_loss_counts_the_span_alone(
    model: LanguageModel, dataset: TokenDataset, gaps: InfillExamples
) -> None:
    modes, sentinels = dataset.vocabulary.modes, dataset.vocabulary.sentinels
    losses = []
    for left, span, right in zip(
        gaps.left.tolist(), gaps.span.tolist(), gaps.right.tolist(), strict=True
    ):
        if not model.metadata.denoising:
            losses += losses_of(model, left, span, bidirectional=False)
        else:
            inputs = [*modes["NLU"], *left, sentinels[0], *right, sentinels[1]]
            both = model.attention == "prefix"
            losses += losses_of(model, inputs, [sentinels[0], *span], bidirectional=both)[1:]
    assert len(losses) == gaps.span.size
    score = measure_infill_loss(model, gaps, dataset.vocabulary)
    assert score.mean == pytest.approx(np.mean(losses), abs=1e-5)


def test_long_spans_get_the_mode_of_long_spans(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    wide = InfillExamples.build(
        dataset, recipe.evaluation.model_copy(update={"infill_span_length": 12})
    )
    modes, sentinels = dataset.vocabulary.modes, dataset.vocabulary.sentinels
    losses = []
    for left, span, right in zip(
        wide.left.tolist(), wide.span.tolist(), wide.right.tolist(), strict=True
    ):
        inputs = [*modes["NLG"], *left, sentinels[0], *right, sentinels[1]]
        losses += losses_of(ul2r_model, inputs, [sentinels[0], *span], bidirectional=True)[1:]
    score = measure_infill_loss(ul2r_model, wide, dataset.vocabulary)
    assert score.mean == pytest.approx(np.mean(losses), abs=1e-5)


def greedy(model: LanguageModel, dataset: TokenDataset, left: list[int], right: list[int]) -> str:
    """What an arm writes into a gap of three tokens, each token from a whole new computation."""
    modes, sentinels = dataset.vocabulary.modes, dataset.vocabulary.sentinels
    bidirectional = model.attention == "prefix"
    inputs, limit = left, 3
    tokens = list(inputs)
    if model.metadata.denoising:
        inputs, limit = [*modes["NLU"], *left, sentinels[0], *right, sentinels[1]], 6
        tokens = [*inputs, sentinels[0]]
    written: list[int] = []
    while len(written) < limit:
        chances = log_chances(model, tokens, len(inputs) if bidirectional else 0)[-1]
        allowed = model.is_text.clone()
        allowed[sentinels[1]] = model.metadata.denoising and bool(written)
        token = int(chances.masked_fill(~allowed, -torch.inf).argmax())
        if token == sentinels[1]:
            break
        written.append(token)
        tokens.append(token)
    return model.decode(written)


def test_infilled_text_is_what_the_arm_likes_best(
    model: LanguageModel, dataset: TokenDataset, gaps: InfillExamples
) -> None:
    texts = [
        greedy(model, dataset, left, right)
        for left, right in zip(gaps.left.tolist(), gaps.right.tolist(), strict=True)
    ]
    true = [model.decode(span) for span in gaps.span.tolist()]
    exact, similar = measure_infill_match(model, gaps, dataset.vocabulary)
    assert exact.mean == np.mean([a == b for a, b in zip(texts, true, strict=True)])
    expected = [
        1 - Levenshtein.distance(a, b) / max(len(a), len(b))
        for a, b in zip(texts, true, strict=True)
    ]
    assert similar.mean == pytest.approx(np.mean(expected))
    assert exact.count == similar.count == len(gaps.span)


def test_an_arm_that_writes_the_span_matches_it_exactly(
    causal_model: LanguageModel, dataset: TokenDataset, gaps: InfillExamples
) -> None:
    """The gaps' spans are put in as what the arm writes, in all but one."""
    own = gaps.span.copy()
    for row, left in enumerate(gaps.left[1:].tolist(), start=1):
        tokens = list(left)
        for place in range(3):
            chances = log_chances(causal_model, tokens, 0)[-1]
            tokens.append(int(chances.masked_fill(~causal_model.is_text, -torch.inf).argmax()))
            own[row, place] = tokens[-1]
    exact, similar = measure_infill_match(causal_model, replace(gaps, span=own), dataset.vocabulary)
    assert exact.mean == pytest.approx(1 - 1 / len(own))
    assert similar.mean >= exact.mean


def test_causal_arms_do_not_see_the_right_side_and_ul2r_does(
    causal_model: LanguageModel,
    ul2r_model: LanguageModel,
    dataset: TokenDataset,
    gaps: InfillExamples,
) -> None:
    other = replace(gaps, right=gaps.right[::-1].copy())
    vocabulary = dataset.vocabulary
    for measured, sees in ((causal_model, False), (ul2r_model, True)):
        before, after = (measure_infill_loss(measured, each, vocabulary) for each in (gaps, other))
        assert (before != after) == sees


def test_a_ul2r_arm_is_measured_as_it_is_served(
    ul2r_model: LanguageModel, dataset: TokenDataset, gaps: InfillExamples
) -> None:
    """Where text survives decoding and encoding, `infill` gives what is measured here."""
    compared = 0
    for row, (left, right) in enumerate(zip(gaps.left.tolist(), gaps.right.tolist(), strict=True)):
        parts = [ul2r_model.decode(left), ul2r_model.decode(right)]
        if [ul2r_model.encode(part) for part in parts] != [left, right]:
            continue
        compared += 1
        filled = infill(ul2r_model, parts, mode="NLU", max_tokens=6).fills[0]
        one = InfillExamples(
            *(np.repeat(a[row : row + 1], 2, 0) for a in (gaps.left, gaps.span, gaps.right))
        )
        _, similar = measure_infill_match(ul2r_model, one, dataset.vocabulary)
        true = ul2r_model.decode(gaps.span[row].tolist())
        assert similar.mean == pytest.approx(Levenshtein.normalized_similarity(filled, true))
    assert compared


def test_settings_that_do_not_fit_are_refused_before_anything_is_measured(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    wide = recipe.evaluation.model_copy(update={"infill_context_length": 30})
    with pytest.raises(
        RecipeError, match="infill_context_length=30 on both sides of infill_span_length=3 makes 67"
    ):
        evaluate(ul2r_model, dataset, recipe.model_copy(update={"evaluation": wide}))
    plain = {"mixture": (Causal(),)}
    long = {
        "objective": recipe.objective.model_copy(update={"sequence_length": 2048, **plain}),
        "evaluation": recipe.evaluation.model_copy(update=plain),
    }
    with pytest.raises(CorpusError, match="has 1 rows of 2048 tokens, but at least 2 are needed"):
        evaluate(ul2r_model, dataset, recipe.model_copy(update=long))


def test_a_model_of_another_vocabulary_is_refused(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    other = replace(dataset.vocabulary, size=dataset.vocabulary.size + 1)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        evaluate(ul2r_model, replace(dataset, vocabulary=other), recipe)


def test_stored_scores_are_those_of_this_export_and_these_settings(
    ul2r_model: LanguageModel, dataset: TokenDataset, recipe: Recipe
) -> None:
    assert load_scores(recipe, dataset) is None
    scores = evaluate(ul2r_model, dataset, recipe)
    save_scores(recipe, dataset, scores)
    assert load_scores(recipe, dataset) == scores
    fewer = recipe.evaluation.model_copy(update={"num_rows": 5})
    assert load_scores(recipe.model_copy(update={"evaluation": fewer}), dataset) is None

    description = recipe.paths.folder / "export/ul2r.json"
    text = description.read_text()
    description.write_text(text.replace('"step": 3', '"step": 4'))
    assert description.read_text() != text
    assert load_scores(recipe, dataset) is None
    description.write_text(text)
    assert load_scores(recipe, dataset) == scores


def test_a_run_without_an_export_says_what_to_run(
    dataset: TokenDataset, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no export at .*: run jobs/export.py RECIPE first"
    ):
        load_scores(recipe.model_copy(update={"name": "other"}), dataset)
