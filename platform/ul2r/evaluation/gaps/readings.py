"""Readings: what a model sees of a text with gaps, and where it writes them.

left    the text up to the end of the last gap, causally and without a mode: of each gap the true text before it
both    mode, parts with a sentinel in place of each gap, closing sentinel, eos if trained so: in both directions unless
        the model's attention is causal; then sentinel and gap in turn
fim     for each gap a row of its own, causally: sentinel, the true text before it, sentinel, the part behind it,
        sentinel, gap (the layout of the denoiser `fim`: prefix, suffix, middle; arXiv 2207.14255, 3)

In all of them a gap is predicted from the true gaps before it. `both` sees the parts behind all later gaps. `fim` sees
those up to the next gap, since text with a hole in it is nothing that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ul2r.errors import RequestError
from ul2r.evaluation.gaps.selection import GapGroup
from ul2r.evaluation.infilling import MIN_LONG_SPAN
from ul2r.evaluation.row_scoring import ScoringRow
from ul2r.inference import LanguageModel

Reading = Literal["left", "both", "fim"]
READINGS: tuple[Reading, ...] = get_args(Reading)
NUM_FIM_SENTINELS = 3


@dataclass(frozen=True)
class GapRow:
    """A row whose targets hold some of a text's gaps.

    Attributes:
        row: What is scored.
        text: Number of the text in its group.
        places: Each gap in the row: its number, and the first of its N targets.
    """

    row: ScoringRow
    text: int
    places: tuple[tuple[int, int], ...]


def find_readings(model: LanguageModel) -> tuple[Reading, ...]:
    """Return the readings that a model was trained for, the left side alone first."""
    readings: list[Reading] = ["left"]
    if model.metadata.denoising:
        readings.append("both")
    if model.metadata.fim:
        readings.append("fim")
    return tuple(readings)


def is_bidirectional(model: LanguageModel, reading: Reading) -> bool:
    """Return whether the inputs of a reading attend to each other in both directions."""
    return reading == "both" and model.attention == "prefix"


def build_rows(model: LanguageModel, group: GapGroup, reading: Reading) -> list[GapRow]:
    """Return the rows of a group.

    Raises:
        RequestError: If they need more sentinels or positions than the model has.
    """
    builders: dict[Reading, Callable[[LanguageModel, GapGroup], Iterable[GapRow]]] = {
        "left": _iter_left,
        "both": _iter_both,
        "fim": _iter_fim,
    }
    _check_sentinels(group, reading)
    rows = list(builders[reading](model, group))

    longest = max(row.row.num_positions for row in rows)
    if longest > model.max_position_embeddings:
        raise RequestError(
            f"gaps {group.name}: a text with its sentinels has {longest} positions, but the model reads "
            f"{model.max_position_embeddings} at most: lower evaluation.gaps.context_length, lengths or slots"
        )
    return rows


def choose_mode(group: GapGroup, model: LanguageModel) -> tuple[int, ...]:
    """Return the tokens of the mode of spans of this length."""
    mode = "NLU" if group.length < MIN_LONG_SPAN else "NLG"
    return model.encode_mode(mode, "a gap with both sides in sight")


def build_prompt(model: LanguageModel, group: GapGroup, text: int) -> tuple[int, ...]:
    """Return the inputs of the reading `both`."""
    sentinels = group.vocabulary.sentinels
    inputs = [*choose_mode(group, model)]
    # The last sentinel closes the inputs, like those of every training example.
    for part, sentinel in zip(group.parts, sentinels, strict=False):
        inputs += [*part[text].tolist(), sentinel]
    return (*inputs, *model.inputs_end)


def build_fim_prompt(
    group: GapGroup, text: int, gap: int, before: Iterable[int]
) -> tuple[int, ...]:
    """Return the inputs of the reading `fim`, up to the sentinel that the gap follows, which is not part of them.

    Args:
        group: The texts.
        text: Number of the text.
        gap: Number of the gap.
        before: All text before the gap.
    """
    prefix, suffix, _ = group.vocabulary.sentinels[:NUM_FIM_SENTINELS]
    return (prefix, *before, suffix, *group.parts[gap + 1][text].tolist())


def _iter_left(model: LanguageModel, group: GapGroup) -> Iterator[GapRow]:  # noqa: ARG001  one signature for all
    first = group.starts[0]
    places = tuple((gap, start - first) for gap, start in enumerate(group.starts))
    for text, tokens in enumerate(group.texts[:, : group.ends[-1]].tolist()):
        yield GapRow(ScoringRow(tuple(tokens[:first]), (), tuple(tokens[first:])), text, places)


def _iter_both(model: LanguageModel, group: GapGroup) -> Iterator[GapRow]:
    openers = group.vocabulary.sentinels[: group.slots]
    # The first sentinel is given; each later one stands before its gap.
    places = tuple((gap, gap * (group.length + 1)) for gap in range(group.slots))
    for text, gaps in enumerate(group.gaps):
        columns = np.asarray(openers, np.int32)[:, None]
        targets = np.concatenate((columns, gaps), axis=1).ravel().tolist()
        inputs = build_prompt(model, group, text)
        yield GapRow(ScoringRow(inputs, (targets[0],), tuple(targets[1:])), text, places)


def _iter_fim(model: LanguageModel, group: GapGroup) -> Iterator[GapRow]:  # noqa: ARG001  one signature for all
    opener = group.vocabulary.sentinels[NUM_FIM_SENTINELS - 1]
    for text, tokens in enumerate(group.texts.tolist()):
        for gap, (start, end) in enumerate(zip(group.starts, group.ends, strict=True)):
            inputs = build_fim_prompt(group, text, gap, tokens[:start])
            row = ScoringRow(inputs, (opener,), tuple(tokens[start:end]))
            yield GapRow(row, text, ((gap, 0),))


def _check_sentinels(group: GapGroup, reading: Reading) -> None:
    needed = {"left": 0, "both": group.slots + 1, "fim": NUM_FIM_SENTINELS}[reading]
    if needed > len(group.vocabulary.sentinels):
        raise RequestError(
            f"gaps {group.name}: they need {needed} sentinels, but the vocabulary has "
            f"{len(group.vocabulary.sentinels)}: lower evaluation.gaps.slots"
        )
