"""Gaps written greedily, many at once; a gap is written after the model's own text of the gaps before it.

left    as many tokens as the gap has, after the text before it
both    all gaps in turn, each ended by the model itself with the next sentinel, as when served
fim     each gap ended by the model itself with eos

What ends its gaps itself is cut off at twice their length, or earlier where the model has no more positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from ul2r.errors import RequestError
from ul2r.evaluation.gaps.readings import (
    NUM_FIM_SENTINELS,
    Reading,
    build_fim_prompt,
    build_prompt,
    is_bidirectional,
)
from ul2r.evaluation.gaps.scores import GapAnswers, Texts
from ul2r.evaluation.gaps.selection import GapGroup
from ul2r.inference import LanguageModel
from ul2r.inference.batch_generation import BatchRequest, generate_batch
from ul2r.inference.plans import CompletionPlan, InfillPlan, Plan

Spans = list[list[list[int]]]
"""Tokens of each gap of each text."""


def write_answers(
    model: LanguageModel, group: GapGroup, reading: Reading, on_progress: Callable[[int], None]
) -> GapAnswers:
    """Write the gaps of a group, and compare them with the true ones as text.

    Different tokens can spell the same text. Both are read behind the true text before the gap, since some tokenizers
    drop the space at the beginning.

    Args:
        model: The model.
        group: Texts with gaps.
        reading: What the model sees of them.
        on_progress: Called with the number of gaps that were written since the last call.
    """
    if reading == "both":
        spans = _write_all(model, group, on_progress)
    else:
        spans = _write_in_turn(model, group, reading, on_progress)
    answers = _decode(model, group, spans)
    pairs = [
        list(zip(row, true_row, strict=True))
        for row, true_row in zip(answers, decode_targets(model, group), strict=True)
    ]
    return GapAnswers(
        answers=answers,
        is_exact=np.asarray([[text == true for text, true in row] for row in pairs]),
        edit_similarity=np.asarray(
            [[Levenshtein.normalized_similarity(text, true) for text, true in row] for row in pairs]
        ),
    )


def decode_targets(model: LanguageModel, group: GapGroup) -> Texts:
    """Return the true texts of the gaps, (B, K)."""
    return _decode(model, group, group.gaps.tolist())


def check_room(model: LanguageModel, group: GapGroup, reading: Reading) -> None:
    """Refuse gaps that a model has no positions to write.

    Raises:
        RequestError: With the number of tokens that have room.
    """
    if reading != "left" and (room := _limit(model, group, reading)) < group.length:
        raise RequestError(
            f"gaps {group.name}: the model reads {model.max_position_embeddings} tokens at most, which leaves room for "
            f"{room} in a gap: lower evaluation.gaps.context_length, or set evaluation.gaps.generate=false"
        )


def _limit(model: LanguageModel, group: GapGroup, reading: Reading) -> int:
    """Return the longest that a gap may be which the model ends itself."""
    limit = 2 * group.length
    if reading == "both":
        num_read = len(build_prompt(model, group, 0))
        room = (model.max_position_embeddings - num_read) // group.slots - 1
    else:
        # Of the last gap, whose text before it may be as long as this limit lets it be.
        num_kept = group.texts.shape[1] - group.slots * group.length
        room = (model.max_position_embeddings - num_kept - NUM_FIM_SENTINELS) // group.slots
    return min(limit, room)


def _write_all(model: LanguageModel, group: GapGroup, on_progress: Callable[[int], None]) -> Spans:
    sentinels = group.vocabulary.sentinels[: group.slots + 1]
    limit = _limit(model, group, "both")
    prompts = [build_prompt(model, group, text) for text in range(len(group))]
    plans = [InfillPlan(sentinels[:-1], sentinels[1:], limit) for _ in prompts]
    num_written = group.slots * (limit + 1)
    return _generate(
        model,
        prompts,
        plans,
        num_written,
        on_progress,
        bidirectional=is_bidirectional(model, "both"),
    )


def _write_in_turn(
    model: LanguageModel, group: GapGroup, reading: Reading, on_progress: Callable[[int], None]
) -> Spans:
    """Write the first gap of all texts, then the second, each after what was written before."""
    spans: Spans = [[] for _ in range(len(group))]
    befores: list[list[int]] = [[] for _ in range(len(group))]
    opener = group.vocabulary.sentinels[NUM_FIM_SENTINELS - 1 : NUM_FIM_SENTINELS]
    for gap in range(group.slots):
        for text, part in enumerate(group.parts[gap].tolist()):
            befores[text] += part
        plans: Sequence[Plan]
        if reading == "left":
            prompts = [tuple(before) for before in befores]
            plans = [CompletionPlan((), group.length) for _ in befores]
        else:
            prompts = [build_fim_prompt(group, t, gap, b) for t, b in enumerate(befores)]
            limit = _limit(model, group, reading)
            plans = [InfillPlan(opener, (group.vocabulary.eos,), limit) for _ in befores]
        # At most the limit, and the sentinel before it.
        written = _generate(
            model, prompts, plans, 2 * group.length + 1, on_progress, bidirectional=False
        )
        for text, (span,) in enumerate(written):
            spans[text].append(span)
            befores[text] += span
    return spans


def _decode(model: LanguageModel, group: GapGroup, spans: Spans) -> Texts:
    """Return the texts of gaps behind the true text before each."""
    return tuple(
        tuple(
            model.decode_continuation(tokens[:start], span)
            for start, span in zip(group.starts, row, strict=True)
        )
        for tokens, row in zip(group.texts.tolist(), spans, strict=True)
    )


def _generate(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    plans: Sequence[Plan],
    num_written: int,
    on_progress: Callable[[int], None],
    *,
    bidirectional: bool,
) -> Spans:
    """Return the tokens of each span of the answers to some prompts, which have `num_written` tokens at most."""
    requests = [
        BatchRequest(prompt, plan, len(prompt) + num_written)
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    answers: Spans = [[] for _ in requests]
    for index, outcome in generate_batch(model, requests, bidirectional=bidirectional):
        answers[index] = list(map(list, outcome.spans))
        on_progress(len(outcome.spans))
    return answers
