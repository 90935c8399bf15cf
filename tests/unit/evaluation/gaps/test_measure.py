"""Losses of gaps against a slow computation, gap by gap, without batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ul2r.config.gaps import GapSettings
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import RecipeError, RequestError
from ul2r.evaluation.gaps import GapGroup, GapScores, find_readings, measure_gaps, select_gaps
from ul2r.evaluation.gaps.selection import ORIGINS
from ul2r.inference import LanguageModel

SETTINGS = GapSettings(lengths=(3, 12), slots=(1, 2), num_gaps=4, context_length=12)


@pytest.fixture(scope="module")
def groups(dataset: TokenDataset) -> tuple[GapGroup, ...]:
    return select_gaps(dataset, SETTINGS)


@pytest.fixture(scope="module")
def fim_model(causal_model: LanguageModel) -> LanguageModel:
    """Model trained on fill-in-the-middle, according to its metadata."""
    model = causal_model
    metadata = replace(model.metadata, fim=True)
    return LanguageModel(model.network, model.tokenizer, metadata, model.eos_token_ids)


def predict(
    model: LanguageModel, inputs: list[int], targets: list[int], prefix: int
) -> torch.Tensor:
    """Return float64 log probabilities (T, V) for each target; the first `prefix` tokens attend to each other."""
    tokens = [*inputs, *targets]
    size = len(tokens)
    mask = torch.tril(torch.ones(size, size, dtype=torch.bool))
    mask[:prefix, :prefix] = True
    with torch.inference_mode():
        logits = model.network(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0]
    return torch.log_softmax(logits.double(), -1)[len(inputs) - 1 : -1]


def expect(
    model: LanguageModel, group: GapGroup, reading: str, text: int, gap: int
) -> tuple[list[float], list[bool]]:
    """Return the losses of a gap's tokens, and whether each is the most likely one."""
    vocabulary = group.vocabulary
    sentinels = list(vocabulary.sentinels)
    parts = [part[text].tolist() for part in group.parts]
    gaps = group.gaps[text].tolist()
    before = [token for pair in zip(parts, gaps[:gap], strict=False) for p in pair for token in p]
    before += parts[gap]

    prefix = 0
    if reading == "left":
        inputs, opening = before, []
    elif reading == "fim":
        inputs = [sentinels[0], *before, sentinels[1], *parts[gap + 1]]
        opening = [sentinels[2]]
    else:
        inputs = [*vocabulary.modes["NLU" if group.length < 12 else "NLG"]]
        for part, sentinel in zip(parts, sentinels, strict=False):
            inputs += [*part, sentinel]
        opening = [token for j in range(gap) for token in (sentinels[j], *gaps[j])]
        opening.append(sentinels[gap])
        prefix = len(inputs) if model.attention == "prefix" else 0

    log_probabilities = predict(model, inputs, [*opening, *gaps[gap]], prefix)[len(opening) :]
    chosen = log_probabilities[range(group.length), gaps[gap]]
    return (-chosen).tolist(), (log_probabilities.argmax(-1) == torch.tensor(gaps[gap])).tolist()


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("ul2r_model", ("left", "both")),
        ("causal_model", ("left",)),
        ("causal_ul2r_model", ("left", "both")),
        ("fim_model", ("left", "fim")),
    ],
)
def test_losses_equal_those_of_each_gap_alone(
    name: str,
    readings: tuple[str, ...],
    groups: tuple[GapGroup, ...],
    request: pytest.FixtureRequest,
) -> None:
    model: LanguageModel = request.getfixturevalue(name)
    assert find_readings(model) == readings

    measured = list(measure_gaps(model, groups))
    wanted = [(group, reading) for group in groups for reading in readings]
    assert [(scores.name, scores.reading, scores.hashes) for scores in measured] == [
        (group.name, reading, group.hashes) for group, reading in wanted
    ]
    for scores, (group, _) in zip(measured, wanted, strict=True):
        for text in range(len(group)):
            for gap in range(group.slots):
                losses, is_most_likely = expect(model, group, scores.reading, text, gap)
                assert scores.losses[text, gap].tolist() == pytest.approx(losses, abs=1e-4)
                assert scores.is_most_likely[text, gap].tolist() == is_most_likely


def test_right_side_changes_only_readings_that_see_it(
    ul2r_model: LanguageModel, fim_model: LanguageModel, groups: tuple[GapGroup, ...]
) -> None:
    group = groups[0]
    texts = group.texts.copy()
    texts[:, group.ends[0] :] = texts[::-1, group.ends[0] :]
    other = replace(group, texts=texts)
    for model in (ul2r_model, fim_model):
        left, sided, other_left, other_sided = measure_gaps(model, (group, other))
        assert np.allclose(left.losses, other_left.losses, atol=1e-5)
        assert not np.allclose(sided.losses, other_sided.losses, atol=1e-2)


def make_scores(group: GapGroup, losses: Any, is_most_likely: Any) -> GapScores:  # noqa: ANN401  arrays
    return GapScores(
        group.length,
        group.slots,
        "left",
        group.hashes,
        group.origins,
        losses,
        is_most_likely,
        targets=(("",) * group.slots,) * len(group),
    )


def test_means_are_over_the_tokens_that_they_name(groups: tuple[GapGroup, ...]) -> None:
    group = groups[2]
    generator = np.random.default_rng(1)
    losses = generator.uniform(size=group.gaps.shape)
    is_most_likely = generator.uniform(size=group.gaps.shape) < 0.5
    found = make_scores(group, losses, is_most_likely).summarize()

    assert found["loss"].mean == pytest.approx(losses.mean())
    # Errors are over texts: two gaps of one text are one observation.
    assert found["loss"].count == len(group)
    assert found["loss"].stderr == pytest.approx(
        losses.mean((1, 2)).std(ddof=1) / len(group) ** 0.5
    )
    assert [found[f"loss_at/{place}"].mean for place in (1, 2, 3)] == pytest.approx(
        losses.mean((0, 1)).tolist()
    )
    assert found["first_token_accuracy"].mean == is_most_likely[..., 0].mean()
    shares = {
        name.partition("/")[2]: score.mean
        for name, score in found.items()
        if name.startswith("loss_of/")
    }
    assert shares
    for origin, mean in shares.items():
        assert mean == pytest.approx(losses[group.origins == ORIGINS.index(origin)].mean())


def test_difference_is_that_of_each_text(groups: tuple[GapGroup, ...]) -> None:
    group = groups[2]
    generator = np.random.default_rng(2)
    losses = generator.uniform(0, 10, size=group.gaps.shape)
    hits = np.ones(group.gaps.shape, bool)
    shift = generator.uniform(size=len(group))[:, None, None]
    first = make_scores(group, losses, hits)
    second = make_scores(group, losses - shift, ~hits)
    found = first.compare(second)

    # However much losses differ from text to text, their differences are known to their own error.
    assert found["loss"].difference.mean == pytest.approx(-shift.mean())
    assert found["loss"].difference.stderr == pytest.approx(shift.std(ddof=1) / len(group) ** 0.5)
    assert found["loss"].difference.stderr < first.summarize()["loss"].stderr
    assert -shift.max() <= found["loss"].low < found["loss"].high <= -shift.min()
    assert found["first_token_accuracy"].difference.mean == -1

    with pytest.raises(RecipeError, match="of other texts"):
        first.compare(make_scores(groups[3], np.ones(groups[3].gaps.shape), None))


def test_text_longer_than_the_model_is_refused(
    ul2r_model: LanguageModel, dataset: TokenDataset
) -> None:
    long = select_gaps(dataset, GapSettings(lengths=(3,), slots=(1,), context_length=64))
    with pytest.raises(RequestError, match=r"3x1: .* 1\d\d positions, .* 128 at most"):
        list(measure_gaps(ul2r_model, long))


def test_more_gaps_than_sentinels_are_refused(
    ul2r_model: LanguageModel, dataset: TokenDataset
) -> None:
    many = select_gaps(dataset, GapSettings(lengths=(1,), slots=(16,), context_length=20))
    with pytest.raises(RequestError, match="need 17 sentinels, but the vocabulary has 16"):
        list(measure_gaps(ul2r_model, many))
