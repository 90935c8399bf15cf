"""Written gaps against what serves: token by token, one text after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rapidfuzz.distance import Levenshtein

from ul2r.config.gaps import GapSettings
from ul2r.data.store.dataset import TokenDataset
from ul2r.errors import RequestError
from ul2r.evaluation.gaps import (
    GapGroup,
    count_steps,
    find_readings,
    measure_gaps,
    select_gaps,
)
from ul2r.evaluation.gaps.readings import build_fim_prompt, build_prompt
from ul2r.evaluation.gaps.writing import check_room
from ul2r.inference import LanguageModel, generate
from ul2r.inference.generation import IncrementalDecoder, Sampler
from ul2r.inference.infilling import generate_span

SETTINGS = GapSettings(lengths=(4,), slots=(1, 2), num_gaps=10, context_length=10)


@pytest.fixture(scope="module")
def groups(dataset: TokenDataset) -> tuple[GapGroup, ...]:
    return select_gaps(dataset, SETTINGS)


def write_left(model: LanguageModel, group: GapGroup, text: int) -> list[list[int]]:
    before: list[int] = []
    spans = []
    for gap in range(group.slots):
        before += group.parts[gap][text].tolist()
        ids = generate(model, before, max_tokens=group.length, stop=(), bidirectional=False)
        spans.append(list(ids))
        before += spans[-1]
    return spans


def write_both(model: LanguageModel, group: GapGroup, text: int) -> list[list[int]]:
    sentinels = group.vocabulary.sentinels
    bidirectional = model.attention == "prefix"
    decoder = IncrementalDecoder(
        model, build_prompt(model, group, text), bidirectional=bidirectional
    )
    sampler = Sampler(model, temperature=0.0, seed=0)
    return [
        generate_span(decoder, sampler, sentinels[gap], sentinels[gap + 1], 2 * group.length)[0]
        for gap in range(group.slots)
    ]


def write_fim(model: LanguageModel, group: GapGroup, text: int) -> list[list[int]]:
    vocabulary = group.vocabulary
    sampler = Sampler(model, temperature=0.0, seed=0)
    before: list[int] = []
    spans = []
    for gap in range(group.slots):
        before += group.parts[gap][text].tolist()
        prompt = build_fim_prompt(group, text, gap, before)
        decoder = IncrementalDecoder(model, prompt, bidirectional=False)
        span, _ = generate_span(
            decoder, sampler, vocabulary.sentinels[2], vocabulary.eos, 2 * group.length
        )
        spans.append(span)
        before += span
    return spans


@pytest.mark.parametrize("name", ["ul2r_model", "causal_ul2r_model", "causal_model"])
def test_answers_equal_those_of_one_text_at_a_time(
    name: str, groups: tuple[GapGroup, ...], request: pytest.FixtureRequest
) -> None:
    model: LanguageModel = request.getfixturevalue(name)
    metadata = replace(model.metadata, fim=not model.metadata.denoising)
    model = LanguageModel(model.network, model.tokenizer, metadata, model.eos_token_ids)
    writers = {"left": write_left, "both": write_both, "fim": write_fim}

    lengths = set()
    for scores in measure_gaps(model, groups, generate=True):
        (group,) = [found for found in groups if found.hashes == scores.hashes]
        assert scores.written is not None
        for text in range(len(group)):
            tokens = group.texts[text].tolist()
            spans = writers[scores.reading](model, group, text)
            lengths |= set(map(len, spans))
            for gap, (start, span) in enumerate(zip(group.starts, spans, strict=True)):
                answer = model.decode_continuation(tokens[:start], span)
                true = model.decode_continuation(tokens[:start], group.gaps[text, gap].tolist())
                assert scores.written.answers[text][gap] == answer
                assert scores.targets[text][gap] == true
                assert scores.written.is_exact[text, gap] == (answer == true)
                assert scores.written.edit_similarity[text, gap] == pytest.approx(
                    1 - Levenshtein.distance(answer, true) / max(len(answer), len(true))
                )
        found = scores.summarize()
        assert found["exact_match"].mean == scores.written.is_exact.mean()
        assert found["edit_similarity"].mean == pytest.approx(scores.written.edit_similarity.mean())
    if metadata.denoising:
        assert len(lengths) > 1, "answers of one length do not show that each row ends by itself"


def test_gap_without_room_is_refused(ul2r_model: LanguageModel, dataset: TokenDataset) -> None:
    settings = GapSettings(lengths=(40,), slots=(2,), num_gaps=4, context_length=24)
    (group,) = select_gaps(dataset, settings)
    with pytest.raises(RequestError, match=r"leaves room for 3\d in a gap"):
        check_room(ul2r_model, group, "both")


@pytest.mark.parametrize("generate_too", [False, True])
@pytest.mark.parametrize("lengths", [(4,), (2, 4)])
def test_progress_counts_every_gap_that_is_scored_or_written(
    ul2r_model: LanguageModel, dataset: TokenDataset, lengths: tuple[int, ...], generate_too: bool
) -> None:
    """Also those whose losses are part of a longer gap's."""
    groups = select_gaps(dataset, SETTINGS.model_copy(update={"lengths": lengths}))
    steps: list[int] = []
    for _ in measure_gaps(ul2r_model, groups, generate=generate_too, on_progress=steps.append):
        pass

    readings = find_readings(ul2r_model)
    assert sum(steps) == count_steps(groups, readings, generate=generate_too)
    # Many small steps: nobody waits long for the next one.
    assert max(steps) <= 10
